"""Objectives that papers make of parts, by the names of the papers."""

from todi.criterions.parameters import Parameter
from todi.criterions.parts import Term, objective
from todi.criterions.schedules import ADAPTIVE_SHARE, INTERPOLATION, linear_schedule
from todi.criterions.selection import FURTHEST_APART, UNSUREST_STUDENT

objective("TAID", Term("forward_kl", target="interpolated"), schedule=INTERPOLATION, help="""\
KL(p_t || q), p_t = softmax((1 - t) z_q + t z_p), t rising from `t_start` (Shing et al., TAID, ICLR 2025).

Nothing flows through p_t. t moves once an optimizer step, by the mean of all ranks; the published code moves it with
every micro-batch, on each rank by itself, and by the cross-entropy of p_t and q, where H(p_t) moves along.
""")

objective("Veto", Term("forward_kl", target="sharpened"), help="""\
KL(Q || q), Q ~ p q^beta, beta falling from `beta_start` in equal steps (Veto, Findings of ACL 2026).

Nothing flows through Q, which the paper leaves open; there is no published code. Where q is p its gradient is not zero:
it sharpens, towards p^(1/(1 - beta)). The paper has 0.8 for mathematics, 1 for code, 0.3 for summaries.
""", schedule=linear_schedule("beta", Parameter(0.8, least=0, help="power of the student in the target at first"),
                     Parameter(0.0, least=0, help="the same after the last step")))

objective("Veto_reverse", Term("reverse_kl", target="sharpened"), help="""\
KL(q || Q), Q ~ p q^beta, the other direction of `Veto` (Veto, Findings of ACL 2026).
""", schedule=linear_schedule("beta", Parameter(0.8, least=0, help="power of the student in the target at first"),
                     Parameter(0.0, least=0, help="the same after the last step")))

objective("ToDi_scheduled", Term("ToDi"), help="""\
ToDi, beta going from `beta_start` to `beta_end` in equal steps (Jung et al., ToDi, EMNLP 2025, have a constant one).
""", schedule=linear_schedule("beta", Parameter(0.0, least=0, help="ToDi's beta at first, where 0 is the even mixture"),
                     Parameter(1.0, least=0, help="the same after the last step")))

objective("EOPD", Term("reverse_kl"), Term("top_k_forward_kl", weight="unsure_teacher"), help="""\
KL(q || p), plus alpha KL over the teacher's top k and a bucket where H(p) > tau (EOPD, ICML 2026).

H is at the temperature of the divergence. The paper samples the first part on the student's own text, where this is
exact; it has no bucket, and so pulls at a student that is its teacher.
""")

objective("SE_KD", Term("forward_kl"), selection=UNSUREST_STUDENT, help="""\
KL(p || q) of the rows of each sample, 20 % by default, where the student's entropy is largest (SE-KD, 2026).

A kept row counts 1 / share times, so that KD is the mean over kept rows, but that a sample keeps up to one row more
than its share. The paper has no cross-entropy (KD_RATE=1) and T = 1. Called on logits it is that of every row.
""")

objective("AdaKD", Term("reverse_kl"), selection=FURTHEST_APART, schedule=ADAPTIVE_SHARE, help="""\
KL(q || p) of the rows furthest from the teacher's, each at its own temperature (Xie et al., AdaKD, AAAI 2026).

Furthest by the Hellinger distance s at the temperature T of the divergence. A kept row is compared at
T exp(-c tanh log(s / median s)), c = `temperature_range`, and counts the square of that times; KD is the mean over kept
rows, as in SE_KD. Their share follows the divergence (`AdaptiveShare`). The paper's rows and median are those of a
batch, which depends on how a step is cut; here they are those of a sample. The published code moves the share with
every micro-batch, and lets gradients flow through the temperatures; here they are constant. The paper has it around
other divergences too (`objective` makes these), no cross-entropy (KD_RATE=1), and T = 1. Called on logits it is that of
every row, at one temperature.
""")
