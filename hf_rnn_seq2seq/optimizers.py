"""Optimisers beside those of transformers' Trainer, by the name that `optim` takes: Adam with an L2 penalty, Adadelta,
and two by dual averaging, which torch lacks."""

import math
from collections.abc import Callable, Iterable
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.optim import Optimizer
from transformers import TrainingArguments

Center = Literal["initial", "zero"]


class DualAveraging(Optimizer):
    """Dual averaging with a diagonal proximal term (Duchi et al. 2011, eq. 3, after Nesterov 2009 and Xiao 2010).

    With g_i the gradients so far, lr_i their steps' learning rates, and c the centre:

        x = argmin_x  <z, x> + L (l1 |x|_1 + l2/2 |x|_2^2) + 1/2 (x - c)' H (x - c)
            z = sum_i lr_i g_i,   L = sum_i lr_i,   H diagonal, from the squares of the gradients
          = sign(u) max(|u| - l1 L, 0) / (H + l2 L)   with u = H c - z, elementwise.

    At a constant learning rate and with `center="zero"` this is the paper's update with eta = lr, and TensorFlow's.
    Two deviations. A gradient is weighted by the learning rate of its own step, as by Nesterov (2009) and Defazio and
    Jelassi (2021): were the sum multiplied by the present rate, a schedule that ends at 0 would take the weights back
    to where they began. And the centre is by default the first weights, not 0, where all units of a network are alike.

    Subclasses say what H is. Parameters without a gradient are left as they are.

    Args:
        params: parameters or groups of them.
        lr: the learning rate.
        l1: the L1 penalty, which makes weights exactly 0.
        weight_decay: the L2 penalty l2; both penalties pull towards 0, wherever the centre is.
        center: `initial`, the weights before the first step, or `zero`.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, object]],
        *,
        lr: float,
        l1: float,
        weight_decay: float,
        center: Center,
        **options: float,
    ) -> None:
        for name, value in {"lr": lr, "l1": l1, "weight_decay": weight_decay}.items():
            if not 0 <= value < math.inf:
                raise ValueError(f"{name}={value!r}: must be at least 0 and finite")
        if center not in get_args(Center):
            raise ValueError(f"center={center!r}: must be one of {', '.join(get_args(Center))}")
        defaults = {"lr": lr, "l1": l1, "weight_decay": weight_decay, "center": center, **options}
        super().__init__(params, defaults)

    def curvature(self, grad: Tensor, state: dict[str, Tensor], step: int, group: dict[str, float]) -> Tensor:
        """H's diagonal, positive, of the gradient's shape, after `state` has taken in this step's gradient.

        Args:
            grad: the gradient.
            state: this parameter's own tensors, empty at first; kept in checkpoints.
            step: from 1.
            group: the options of the parameter's group.
        """
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Make one step; `closure`, if given, computes the loss and its gradients anew."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, self.state[parameter], group)
        return loss

    def _update(self, parameter: Tensor, grad: Tensor, state: dict, group: dict) -> None:
        if not state:
            # Numbers and not tensors: on loading, torch would round tensors to the parameter's type.
            state["step"], state["lr_sum"] = 0, 0.0
            state["gradient_sum"] = torch.zeros_like(parameter)
            if group["center"] == "initial":
                state["center"] = parameter.clone()
        lr = float(group["lr"])
        state["step"] += 1
        state["lr_sum"] += lr
        gradient_sum = state["gradient_sum"].add_(grad, alpha=lr)
        curvature = self.curvature(grad, state, state["step"], group)
        l1, l2 = group["l1"] * state["lr_sum"], group["weight_decay"] * state["lr_sum"]
        if l1 == l2 == 0:
            # The same without a detour by H c, whose rounding would move weights that never had a gradient.
            new = -gradient_sum / curvature
            parameter.copy_(new + state["center"] if "center" in state else new)
            return
        dual = curvature * state["center"] - gradient_sum if "center" in state else -gradient_sum
        parameter.copy_(dual.sign() * (dual.abs() - l1).clamp_(min=0) / (curvature + l2))


class AdagradDA(DualAveraging):
    """AdaGrad by dual averaging: H = sqrt(a + sum_i g_i^2) (Duchi et al. 2011, fig. 1).

    Deviation: the small constant is inside the root, as in TensorFlow's AdagradDA, and not added to it.

    Args:
        initial_accumulator: a, where the sum of squares begins.
        params, lr, l1, weight_decay, center: as for [`DualAveraging`].
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, object]],
        lr: float = 0.1,
        initial_accumulator: float = 0.1,
        l1: float = 0.0,
        weight_decay: float = 0.0,
        center: Center = "initial",
    ) -> None:
        if not 0 < initial_accumulator < math.inf:
            raise ValueError(f"initial_accumulator={initial_accumulator!r}: must be above 0 and finite")
        super().__init__(
            params, lr=lr, l1=l1, weight_decay=weight_decay, center=center, initial_accumulator=initial_accumulator
        )

    def curvature(self, grad: Tensor, state: dict[str, Tensor], step: int, group: dict[str, float]) -> Tensor:
        if "square_sum" not in state:
            state["square_sum"] = torch.full_like(grad, group["initial_accumulator"])
        return state["square_sum"].addcmul_(grad, grad).sqrt()


class RMSpropDA(DualAveraging):
    """RMSProp by dual averaging: AdaGrad's sum of squares is t times their mean; here that mean decays.

        v_t = alpha v_{t-1} + (1 - alpha) g_t^2
        H_t = max(H_{t-1}, sqrt(t v_t / (1 - alpha^t)) + eps)

    This is the matrix of Mukkamala and Hein's RMSProp (2017), whose steps fall with sqrt(t), put into
    Duchi et al.'s dual averaging. Deviations: v is corrected for its start at 0 as in Adam (Kingma and Ba 2015), and
    H may not shrink (the maximum is AMSGrad's, Reddi et al. 2018): dual averaging needs proximal terms that grow, and
    a smaller H would enlarge all of the way made so far. As alpha approaches 1, it becomes AdaGrad's sum.

    Args:
        alpha: the decay of the mean of squares.
        eps: what is added to the root, above 0.
        params, lr, l1, weight_decay, center: as for [`DualAveraging`].
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, object]],
        lr: float = 0.03,
        alpha: float = 0.99,
        eps: float = 1e-8,
        l1: float = 0.0,
        weight_decay: float = 0.0,
        center: Center = "initial",
    ) -> None:
        if not 0 <= alpha < 1:
            raise ValueError(f"alpha={alpha!r}: must be at least 0 and below 1")
        if not 0 < eps < math.inf:
            raise ValueError(f"eps={eps!r}: must be above 0 and finite")
        super().__init__(params, lr=lr, l1=l1, weight_decay=weight_decay, center=center, alpha=alpha, eps=eps)

    def curvature(self, grad: Tensor, state: dict[str, Tensor], step: int, group: dict[str, float]) -> Tensor:
        if "square_mean" not in state:
            state["square_mean"], state["curvature"] = torch.zeros_like(grad), torch.zeros_like(grad)
        alpha = group["alpha"]
        mean = state["square_mean"].mul_(alpha).addcmul_(grad, grad, value=1 - alpha)
        now = (mean * (step / (1 - alpha**step))).sqrt_().add_(group["eps"])
        return torch.maximum(state["curvature"], now, out=state["curvature"])


OPTIMIZERS: dict[str, type[Optimizer]] = {
    "adam": torch.optim.Adam,
    "adadelta": torch.optim.Adadelta,
    "adagrad_da": AdagradDA,
    "rmsprop_da": RMSpropDA,
}

# What a learning rate means differs by orders of magnitude between them.
LEARNING_RATES = {"adadelta": 1.0, "adagrad_da": 0.1, "rmsprop_da": 0.03}
DEFAULT_LEARNING_RATE = 1e-3

# The options that `optim_args` may give, with a default where torch's is not the one wanted or that shows the type.
OPTIONS: dict[str, dict[str, float | bool | str]] = {
    "adam": {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "amsgrad": False},
    "adadelta": {"rho": 0.95, "eps": 1e-6},  # Bahdanau et al. 2015, appendix B.2
    "adagrad_da": {"initial_accumulator": 0.1, "l1": 0.0, "center": "initial"},
    "rmsprop_da": {"alpha": 0.99, "eps": 1e-8, "l1": 0.0, "center": "initial"},
}


def optimizer_class_and_options(args: TrainingArguments) -> tuple[type[Optimizer], dict[str, object]]:
    """The class and keyword arguments of an optimiser named in [`OPTIMIZERS`].

    Adam's betas and epsilon are `adam_beta1`, `adam_beta2` and `adam_epsilon`; `optim_args` overrides them.

    Raises:
        ValueError: an option that the optimiser does not have, or a value that it can't be.
    """
    name = str(args.optim)
    options: dict[str, object] = {**OPTIONS[name]}
    if name == "adam":
        options |= {"beta1": args.adam_beta1, "beta2": args.adam_beta2, "eps": args.adam_epsilon, "fused": True}
    options |= parse_options(name, args.optim_args)
    if name == "adam":
        options["betas"] = (options.pop("beta1"), options.pop("beta2"))
    return OPTIMIZERS[name], {"lr": args.learning_rate, **options}


def parse_options(name: str, text: str | None) -> dict[str, float | bool | str]:
    """The options in `optim_args`, as `l1=1e-6,center=zero`, of one of [`OPTIMIZERS`]."""
    known = OPTIONS[name]
    options: dict[str, float | bool | str] = {}
    for item in (text or "").replace(" ", "").split(","):
        if not item:
            continue
        key, _, value = item.partition("=")
        if key not in known:
            raise ValueError(f"optim_args: {item!r} is no option of optim={name!r}; there are {', '.join(known)}")
        default = known[key]
        if isinstance(default, bool):
            if value.lower() not in ("true", "false"):
                raise ValueError(f"optim_args: {item!r}: must be true or false")
            options[key] = value.lower() == "true"
        elif isinstance(default, float):
            try:
                options[key] = float(value)
            except ValueError:
                raise ValueError(f"optim_args: {item!r}: must be a number") from None
        else:
            options[key] = value
    return options
