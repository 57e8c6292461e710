"""What a row counts for in a divergence, found out from both models' distributions of that row."""

from torch import Tensor

from todi.criterions.parameters import Parameter
from todi.criterions.parts import row_weight
from todi.criterions.row_statistics import entropy


@row_weight("unsure_teacher", tau=Parameter(0.8, help="entropy of the teacher, in nats, above which a row counts"),
            alpha=Parameter(1.0, least=0, help="what it counts for"))
def unsure_teacher(log_p: Tensor, log_q: Tensor, *, tau: float, alpha: float) -> Tensor:
    """alpha where H(p) > tau, else 0; with tau below 0 every row counts (EOPD, 2026)."""
    return (entropy(log_p) > tau).to(log_p.dtype).mul_(alpha)
