"""Tests a model's own `train_step` on JAX, running its jaxpr operation by operation."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from keras import ops, tree

from accumtune.accumulation.engines.engine_jax import _precision
from accumtune.accumulation.own_step import certificate as certificates
from accumtune.accumulation.own_step import interception
from accumtune.accumulation.own_step import own_train_step as own
from accumtune.accumulation.own_step import own_trial as trials
from accumtune.accumulation.own_step.dataflow import Recording, Rules, positions
from accumtune.accumulation.own_step.retraced_jits import retraced_jits
from accumtune.accumulation.patched_attributes import replaced


def certified(model: Any, state: Any, takes: list[Callable[[], Any]], form: int) -> own.Certificate:
    """Returns the certificate of a model in this state, from the first samples of a window."""
    batch = trials.first_samples(model, takes)
    with trials.unchanged(model, has_state=False):
        return certificates.certify(model, JaxTrial(model, state, form), batch)


class JaxTrial:
    """Runs the step operation by operation."""

    hands_on_grad = False

    def __init__(self, model: Any, state: Any, form: int) -> None:
        self.model, self.state, self.form = model, state, form
        self.rules = RULES

    def run(
        self,
        batch: Any,
        draws: Any,
        share: float,
        *,
        kinds: tuple[str, ...] | None = None,
        update: list[Any] | None = None,
        is_last: bool = True,
        metric_state: Any = None,
        change_of_weights: float = 0.0,
    ) -> certificates.Run:
        model = self.model
        recording = Recording(self.rules)
        found = certificates.Run(recording)
        trainable, non_trainable, optimizer, metrics = self.state
        changed = zip(trials.changed_weights(trainable, change_of_weights), trainable, strict=True)
        trainable = [jnp.asarray(value, old.dtype) for value, old in changed]
        state = (trainable, non_trainable, optimizer, metrics if metric_state is None else metric_state)
        data = tree.map_structure(lambda leaf: None if leaf is None else jnp.asarray(leaf), batch)
        marked = [leaf for leaf in tree.flatten(data) if leaf is not None]
        taken: list[Any] = []

        def step(state: Any, leaves: Any, update: Any) -> Any:
            leaves = iter(leaves)
            data = tree.map_structure(lambda leaf: None if leaf is None else next(leaves), batch)
            scalars: list[Any] = []
            taken.clear()
            found.applies = 0

            def handed(optimizer: Any, gradients: Any, trainable: Any) -> Any:
                found.applies += 1
                taken[:] = gradients
                if not is_last:
                    return trainable, optimizer
                steps = zip(trainable, gradients if update is None else update, strict=True)
                moved = [
                    value - (0.01 * one / (jnp.max(jnp.abs(one), initial=0.0) + 1e-30)).astype(value.dtype)
                    for value, one in steps
                ]
                return moved, optimizer

            with (
                trials.other_optimizers(model) as found.other_optimizers,
                trials.fixed_statistics(model),
                trials.full_precision(model),
                interception.weighed_scalars(model, share, kinds, scalars),
                replaced(model.optimizer, {"stateless_apply": handed}),
                retraced_jits(),
            ):
                logs, new = model.train_step(state, interception.packed(data, self.form))
            return list(taken), scalars, [ops.convert_to_tensor(leaf) for leaf in tree.flatten(logs)], new

        given = None if update is None else [jnp.asarray(one, _precision()) for one in update]
        traced, shape = jax.make_jaxpr(step, return_shape=True)(state, marked, given)
        arguments = jax.tree_util.tree_leaves((state, marked, given))
        first = len(jax.tree_util.tree_leaves(state))
        interpreter = _Interpreter(recording, draws)
        samples = range(first, first + len(marked))
        values, keys = interpreter.run(traced, arguments, samples)
        gradients, scalars, logs, new = jax.tree_util.tree_unflatten(jax.tree_util.tree_structure(shape), values)
        found.keys = keys[: len(gradients)]
        found.gradients = [trials.array(one) for one in gradients]
        found.dtypes = [str(one.dtype) for one in gradients]
        found.scalars = [float(trials.array(one)) for one in scalars]
        found.logs = [trials.array(one) for one in logs]
        found.metric_state = new[3]
        pairs = zip(model.metrics_variables, new[3], strict=True)
        found.metrics = {variable.path: trials.array(value) for variable, value in pairs}
        found.assigned = {
            variable.path: trials.array(value)
            for variables, values in (
                (model.trainable_variables, new[0]),
                (model.non_trainable_variables, new[1]),
                (model.optimizer.variables, new[2]),
            )
            for variable, value in zip(variables, values, strict=True)
            if not interception.is_seed(variable)
        }
        return found


class _Interpreter:
    """Evaluates a jaxpr, records its operations, and replaces the results of random ones by those of `draws`."""

    def __init__(self, recording: Recording, draws: Any) -> None:
        self.recording, self._draws = recording, draws
        self._numbers = itertools.count()

    def run(self, traced: Any, arguments: list[Any], samples: Any) -> tuple[list[Any], list[int]]:
        keys = [next(self._numbers) for _ in arguments]
        self.recording.mark([keys[index] for index in samples])
        results = self._evaluate(traced.jaxpr, traced.consts, list(zip(arguments, keys, strict=True)))
        return [value for value, _ in results], [key for _, key in results]

    def _evaluate(self, jaxpr: Any, consts: Any, arguments: list[tuple[Any, int]]) -> list[tuple[Any, int]]:
        known: dict[Any, tuple[Any, int]] = {}
        for variable, value in zip(jaxpr.constvars, consts, strict=True):
            known[variable] = (value, next(self._numbers))
        known.update(zip(jaxpr.invars, arguments, strict=True))

        def read(variable: Any) -> tuple[Any, int]:
            return known[variable] if not hasattr(variable, "val") else (variable.val, next(self._numbers))

        for equation in jaxpr.eqns:
            inputs = [read(variable) for variable in equation.invars]
            known.update(zip(equation.outvars, self._operation(equation, inputs), strict=True))
        return [read(variable) for variable in jaxpr.outvars]

    def _operation(self, equation: Any, inputs: list[tuple[Any, int]]) -> list[tuple[Any, int]]:
        name, parameters = equation.primitive.name, equation.params
        inner = parameters.get("jaxpr") or parameters.get("call_jaxpr") or parameters.get("fun_jaxpr")
        if inner is not None and name in _CALLS:
            inner, consts = (inner.jaxpr, inner.consts) if hasattr(inner, "consts") else (inner, ())
            return self._evaluate(inner, consts, inputs)
        if name == "cond":
            raise certificates.ConditionError(name)
        bound = equation.primitive.get_bind_params(parameters)
        functions, parameters = bound if isinstance(bound, tuple) else ((), bound)  # before JAX 0.10
        result = equation.primitive.bind(*functions, *(value for value, _ in inputs), **parameters)
        results = list(result) if equation.primitive.multiple_results else [result]
        is_draw = name in ("random_bits", "threefry2x32", "rng_bit_generator")
        if is_draw:
            results = [jnp.asarray(self._draws.next(np.asarray(one)), one.dtype) for one in results]
        keyed = [(one, next(self._numbers)) for one in results]
        if name == "convert_element_type" and not jnp.issubdtype(results[0].dtype, jnp.floating):
            name = "convert_element_type to integers"
        self.recording.add(name, _shaped(inputs), _shaped(keyed), precision=str(results[0].dtype) if results else "")
        if is_draw:
            self.recording.mark([key for _, key in keyed])
        return keyed


def _shaped(values: list[tuple[Any, int]]) -> list[tuple[Any, Any]]:
    return [(key, tuple(np.shape(value))) for value, key in values]


_CALLS = frozenset(
    "jit pjit closed_call core_call remat remat2 checkpoint custom_jvp_call custom_vjp_call custom_vjp_call_jaxpr "
    "custom_lin".split()
)

RULES = Rules(
    linear=frozenset(
        "add add_any sub neg convert_element_type reshape reduce_sum concatenate slice squeeze expand_dims transpose "
        "broadcast_in_dim pad copy copy_p rev stop_gradient real reduce_precision split "
        "device_put".split()
    ),
    products=frozenset("mul dot_general".split()),
    linear_in=positions("div gather dynamic_slice scatter-add"),
    choices=frozenset("select_n".split()),
    reductions=frozenset(
        "reduce_sum dot_general conv_general_dilated scatter-add scatter_add scan while add_any reshape squeeze".split()
    ),
    only_shapes=frozenset(),
)
