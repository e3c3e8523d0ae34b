"""Engines: what runs a teacher.

base.py            the protocol, what an engine declares and gives, and the registry of engines by name
batch.py           packed rows as an engine is given them
tiles.py           how many positions have their logits in memory at once
transformers.py    a Hugging Face model in this process
layer_states.py    hidden states between the layers of such a model
tiled_head.py      the output head of such a model on its own, with the model's own code
vllm.py            vLLM in a process of its own:
vllm_worker/         what runs in that process, in vLLM's environment
worker_process.py    the process, started, asked and ended
frames.py            arrays and a message on a pipe
target_rows.py       targets as one array
start_check.py       its targets against those of transformers
free_memory.py       bytes of memory that could be taken now
server.py          a teacher that is served already:
completions.py       log-probabilities over HTTP
"""
