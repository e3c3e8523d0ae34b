"""What runs inside vLLM's environment: vLLM runs the body and the head, kdcache selects, and only entries leave.

site/      what is put on the path of that environment: the door, and the entry point by which vLLM finds it
serve.py   the process: frames in, frames out
model.py   the teacher's own class in vLLM, with a pooler that selects from the logits of each position
settings.py  what both sides agree on

Of kdcache it imports the selection and what that needs: torch, numpy, numba and safetensors, which vLLM needs too.
"""
