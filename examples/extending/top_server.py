"""An engine outside the package: like a server, it gives the k most likely tokens at T = 1 and nothing else."""

import torch

from kdcache import SparseTargets, register_engine
from kdcache.teacher.engines.base import Engine, EngineKnowledge, EngineOutput


@register_engine
class TopServer(Engine):
    """A bigram teacher: its prediction depends on one token."""

    name = "top-server"
    knows = EngineKnowledge(whole_vocabulary=False, temperatures=(1.0,), entropy=False, label_logprob=False)

    def __init__(self, spec, folder, rows):
        logits = 3 * torch.randn(rows.vocab_size, rows.vocab_size, generator=torch.Generator().manual_seed(3))
        self.logprobs = logits.log_softmax(-1)

    def run(self, batch, request):
        tokens = [piece.tokens[piece.slots] for piece in batch.pieces()]
        top = self.logprobs[torch.cat([torch.zeros(0, dtype=torch.long), *tokens])].topk(request.selection.k)
        return EngineOutput(positions=SparseTargets.from_topk(top.indices, top.values))

    def describe(self):
        return {"served_by": "nobody"}
