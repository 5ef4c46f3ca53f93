"""Ways to choose a mixture, one file each but for those that need no measurement; ``method:`` in a config names one.

Each is a function of the problem (the starting mixture D0, the pools, the limits) and of stages that it may ask for,
and gives volumes of the same total. What it trains, passes over or evaluates on the way is its cost. `equilibrium`,
this project's own, is the loop in ``service.runs.optimisation``: its mixtures are trained one after another.
"""

from __future__ import annotations

from collections.abc import Callable

from ideal.methods import doge, doremi, leave_one_out, merge, regmix, simple
from ideal.methods.problem import Problem, Stages

Method = Callable[[Problem, Stages], dict[str, int]]

METHODS: dict[str, Method] = {
    "joint": simple.joint,
    "base": simple.base,
    "uniform": simple.uniform,
    "leave_one_out": leave_one_out.choose,
    "specific": simple.specific,
    "random": simple.random,
    "doremi": doremi.choose,
    "doge": doge.choose,
    "merge": merge.choose,
    "regmix": regmix.choose,
}
