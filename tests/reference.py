"""The objective once more, as slow and as plain as it can be: one row at a time, full logits, float64.

Written from the definitions alone, it shares no code with `todi`: what both agree on is unlikely to be wrong in both.
A row's `p` and `q` are the probabilities (V,) of teacher and student. Where a weight is a constant of the objective
(detached), `weight` may be given, so that a test can hold it still while it moves the student.
"""

import torch
from torch import Tensor


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p.log() - q.log())).sum()


def forward_kl(p, q):
    return kl(p, q)


def reverse_kl(p, q):
    return kl(q, p)


def js_divergence(p, q):
    return kl(p, (p + q) / 2) / 2 + kl(q, (p + q) / 2) / 2


def tvd(p, q):
    return (p - q).abs().sum() / 2


def skewed_forward_kl(p, q, skew_lambda=0.1):
    return kl(p, skew_lambda * p + (1 - skew_lambda) * q)


def skewed_reverse_kl(p, q, skew_lambda=0.1):
    return kl(q, (1 - skew_lambda) * p + skew_lambda * q)


def adaptive_kl_weight(p, q, alpha=0.5):
    order = p.argsort()
    tail = p[order].cumsum(0) <= alpha
    gap = (p - q).abs()[order]
    return gap[~tail].sum() / (gap[~tail].sum() + gap[tail].sum())


def adaptive_kl(p, q, alpha=0.5, weight=None):
    w = adaptive_kl_weight(p, q, alpha).detach() if weight is None else weight
    return w * kl(p, q) + (1 - w) * kl(q, p)


def todi_weight(p, q, beta=1.0):
    return 1 / (1 + (p / q) ** -beta)


def todi(p, q, beta=1.0, weight=None):
    w = todi_weight(p, q, beta).detach() if weight is None else weight
    return (w * p * (p / q).log() + (1 - w) * q * (q / p).log()).sum()


def gkd(p, q, beta=0.5):
    m = beta * p + (1 - beta) * q
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


def abkd(p, q, alpha=0.2, beta=0.7):
    """By powers, and in the limits by their own formulas."""
    s, r = alpha + beta, (q / p).log()
    if alpha == beta == 0:
        return (r ** 2).sum() / 2
    if beta == 0:
        return (p ** alpha * (-alpha * r - 1) + q ** alpha).sum() / alpha ** 2
    if alpha == 0:
        return (q ** beta * (beta * r - 1) + p ** beta).sum() / beta ** 2
    return -(p ** alpha * q ** beta - alpha / s * p ** s - beta / s * q ** s).sum() / (alpha * beta)


def alpha_mixture(p, q, alpha, skew_lambda):
    power = (1 - alpha) / 2
    r = (p ** skew_lambda * q ** (1 - skew_lambda) if power == 0 else
         (skew_lambda * p ** power + (1 - skew_lambda) * q ** power) ** (1 / power))
    return r / r.sum()


def amid(p, q, alpha=-5.0, skew_lambda=0.1, ab_alpha=0.2, ab_beta=0.7):
    return abkd(p, alpha_mixture(p, q, alpha, skew_lambda), ab_alpha, ab_beta)


def amid_qr(p, q, alpha=-5.0, skew_lambda=0.1, ab_alpha=0.2, ab_beta=0.7):
    return abkd(q, alpha_mixture(p, q, alpha, skew_lambda), ab_alpha, ab_beta)


def top_k_forward_kl(p, q, k=16):
    order = p.argsort(descending=True)[:min(k, len(p) - 1)]
    rest = torch.ones_like(p, dtype=torch.bool)
    rest[order] = False
    return kl(p[order], q[order]) + (kl(p[rest].sum(), q[rest].sum()) if rest.any() else 0)


def mixed_target(p, q, skew_lambda=0.1):
    return (1 - skew_lambda) * p + skew_lambda * q


def skewed_reverse_kl_detached(p, q, skew_lambda=0.1, weight=None):
    return kl(q, mixed_target(p, q, skew_lambda).detach() if weight is None else weight)


def taid_target(p, q, t_start=0.4, **schedule):
    mixed = p ** t_start * q ** (1 - t_start)
    return mixed / mixed.sum()


def taid(p, q, t_start=0.4, weight=None, **schedule):
    return kl(taid_target(p, q, t_start).detach() if weight is None else weight, q)


def veto_target(p, q, beta_start=0.8, **schedule):
    mixed = p * q ** beta_start
    return mixed / mixed.sum()


def veto(p, q, beta_start=0.8, weight=None, **schedule):
    return kl(veto_target(p, q, beta_start).detach() if weight is None else weight, q)


def veto_reverse(p, q, beta_start=0.8, weight=None, **schedule):
    return kl(q, veto_target(p, q, beta_start).detach() if weight is None else weight)


def todi_scheduled_weight(p, q, beta_start=0.0, **schedule):
    return todi_weight(p, q, beta_start)


def todi_scheduled(p, q, beta_start=0.0, weight=None, **schedule):
    return todi(p, q, beta_start, weight)


def eopd(p, q, k=16, tau=0.8, alpha=1.0):
    unsure = -(p * p.log()).sum() > tau
    return kl(q, p) + (alpha * top_k_forward_kl(p, q, k) if unsure else 0)


def se_kd(p, q, share=0.2):
    """Of a row that is kept."""
    return kl(p, q)


def ada_kd(p, q, **schedule):
    """Of a row that is kept, at its temperature."""
    return kl(q, p)


def advantage(p, q, label):
    """What the teacher gives the token that was sampled, more than the student does."""
    return p[label].log() - q[label].log()


def sampled_reverse_kl(p, q, label, weight=None):
    """The value is the sampled log q/p; with the advantage held still, the policy gradient's loss."""
    if weight is not None:
        return -weight * q[label].log()
    constant = advantage(p, q, label).detach()
    return -constant - constant * (q[label].log() - q[label].log().detach())


DIVERGENCES = {"forward_kl": forward_kl, "reverse_kl": reverse_kl, "js_divergence": js_divergence, "tvd": tvd,
               "skewed_forward_kl": skewed_forward_kl, "skewed_reverse_kl": skewed_reverse_kl,
               "adaptive_kl": adaptive_kl, "ToDi": todi, "gkd": gkd, "abkd": abkd, "amid": amid, "amid_qr": amid_qr,
               "top_k_forward_kl": top_k_forward_kl, "TAID": taid, "Veto": veto, "Veto_reverse": veto_reverse,
               "skewed_reverse_kl_detached": skewed_reverse_kl_detached,
               "ToDi_scheduled": todi_scheduled, "EOPD": eopd, "SE_KD": se_kd, "AdaKD": ada_kd,
               "sampled_reverse_kl": sampled_reverse_kl}
# What is constant in an objective: weights, or a target.
WEIGHTS = {"adaptive_kl": adaptive_kl_weight, "ToDi": todi_weight, "TAID": taid_target, "Veto": veto_target,
           "Veto_reverse": veto_target, "skewed_reverse_kl_detached": mixed_target,
           "ToDi_scheduled": todi_scheduled_weight, "sampled_reverse_kl": advantage}
# Estimates by one token of a row.
SAMPLED = ("sampled_reverse_kl",)
# Objectives that pull a student away from a teacher that it is equal to.
SHARPENING = ("Veto", "Veto_reverse")


def divergence(name: str, student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0,
               weights: list[Tensor] | None = None, labels: Tensor | None = None, **params: float) -> Tensor:
    """(N, V), (N, V) -> (N,); entries of -inf in either are left out of both."""
    assert name in DIVERGENCES, f"the divergence {name!r} has no independent reference: add one to tests/reference.py"
    values, places = [], labels_among_the_common(name, student_logits, teacher_logits, labels)
    for row, (p, q) in enumerate(probabilities(student_logits, teacher_logits, temperature)):
        frozen = {} if weights is None else {"weight": weights[row]}
        absent = places[row] == {"label": None}  # what no model gives is never sampled
        values.append(0 * q.sum() if absent else DIVERGENCES[name](p, q, **params, **frozen, **places[row]))
    return torch.stack(values)


def weights(name: str, student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0,
            labels: Tensor | None = None, **params: float) -> list[Tensor] | None:
    """The detached weight of each row; None for a divergence without one."""
    if name not in WEIGHTS:
        return None
    places = labels_among_the_common(name, student_logits, teacher_logits, labels)
    return [WEIGHTS[name](p, q, **params, **place).detach()
            for (p, q), place in zip(probabilities(student_logits, teacher_logits, temperature), places, strict=True)]


def labels_among_the_common(name: str, student_logits: Tensor, teacher_logits: Tensor,
                            labels: Tensor | None) -> list[dict[str, int | None]]:
    """What a sampled divergence takes besides: the place of each row's label, None where a model does not give it."""
    if name not in SAMPLED:
        return [{}] * len(student_logits)
    common = (student_logits > -torch.inf) & (teacher_logits > -torch.inf)
    return [{"label": int(row[:label].sum()) if row[label] else None}
            for row, label in zip(common, labels.tolist(), strict=True)]


def probabilities(student_logits: Tensor, teacher_logits: Tensor, temperature: float):
    """(p, q) of each row over the entries that both models have."""
    for z, t in zip(student_logits.double(), teacher_logits.detach().double(), strict=True):
        common = (z > -torch.inf) & (t > -torch.inf)
        yield (t[common] / temperature).softmax(0), (z[common] / temperature).softmax(0)


def head_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None = None, softcap: float | None = None,
                scale: float = 1.0) -> Tensor:
    """(N, H) -> (N, V); a bias of -inf is a logit of -inf."""
    logits = hidden.double() @ weight.double().T
    if bias is not None:
        logits = logits + bias.double()
    logits = logits * scale
    if softcap is not None:
        logits = (softcap * (logits / softcap).tanh()).masked_fill(logits == -torch.inf, -torch.inf)
    return logits


def cross_entropy(logits: Tensor, label: int, smoothing: float) -> Tensor:
    """Of one row (V,); the target is 1 - smoothing on the label plus smoothing / V on each of the V entries."""
    allowed = logits > -torch.inf
    target = allowed.double() * smoothing / allowed.sum()
    target[label] += 1 - smoothing
    return -(target[allowed] * logits[allowed].softmax(0).log()).sum()


def loss_sums(student_logits: Tensor, teacher_logits: Tensor | None, labels: Tensor, name: str | None = None,
              params: dict[str, float] | None = None, temperature: float = 1.0, kd_rate: float = 0.5,
              label_smoothing: float = 0.0) -> dict[str, Tensor]:
    """loss, kd, ce, correct and tokens over the labelled rows of (N, V_s) and (N, V_t) logits."""
    labelled = [row for row, label in enumerate(labels.tolist()) if label != -100]
    z, zero = student_logits[labelled], student_logits.new_zeros((), dtype=torch.float64)
    kd = zero
    if teacher_logits is not None:
        vocabulary = min(z.shape[1], teacher_logits.shape[1])
        z, t = z[:, :vocabulary], teacher_logits[labelled, :vocabulary]
        z = z.masked_fill(t == -torch.inf, -torch.inf)
        kd = divergence(name, z, t, temperature, labels=labels[labelled], **params or {}).sum() if labelled else zero
    targets = [labels[row].item() for row in labelled]
    ce = sum((cross_entropy(row, label, label_smoothing) for row, label in zip(z, targets, strict=True)), zero)
    correct = sum(row.argmax().item() == label for row, label in zip(z, targets, strict=True))
    kd_rate = 0.0 if teacher_logits is None else kd_rate
    return {"loss": (1 - kd_rate) * ce + kd_rate * kd, "kd": kd, "ce": ce,
            "correct": torch.tensor(correct), "tokens": torch.tensor(len(labelled))}
