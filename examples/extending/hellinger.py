"""A divergence outside the package: the squared Hellinger distance, over the entries and one bucket for the tail."""

import torch

from kdcache import register_divergence


def hellinger(log_q, log_tail_q, teacher):
    """1 - sum sqrt(p q). `[N, K]` and `[N]` of the student, the same of the teacher; returns `[N]`."""
    log_p = torch.cat([teacher.log_p, teacher.log_tail[:, None]], -1).to(log_q.dtype)  # [N, K + 1]
    return 1 - ((log_p + torch.cat([log_q, log_tail_q[:, None]], -1)) / 2).exp().sum(-1)


register_divergence("hellinger", hellinger)
