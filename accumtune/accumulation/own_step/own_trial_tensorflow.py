"""Tests a model's own `train_step` on TensorFlow, eagerly."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import tensorflow as tf
from keras import tree
from tensorflow.python.framework import op_callbacks
from tensorflow.python.ops import (
    gen_random_ops,
    gen_stateful_random_ops,
    gen_stateless_random_ops,
    gen_stateless_random_ops_v2,
)

from accumtune.accumulation.engines.inlined_functions import inlined_functions
from accumtune.accumulation.own_step import certificate as certificates
from accumtune.accumulation.own_step import interception
from accumtune.accumulation.own_step import own_train_step as own
from accumtune.accumulation.own_step import own_trial as trials
from accumtune.accumulation.own_step.dataflow import Recording, Rules, positions
from accumtune.accumulation.patched_attributes import replaced
from accumtune.errors import CustomTrainStepError


def certified(model: Any, takes: list[Callable[[], Any]], form: int) -> own.Certificate:
    """Returns the certificate of a model, from the first samples of a window."""
    batch = trials.first_samples(model, takes)
    condition = _trace(model, _tensors(batch, form))
    if condition:  # a condition may only create variables: then it is gone in a second trace
        condition = _trace(model, _tensors(batch, form))
    if condition:
        seen = f"it has a condition ({condition}), of which only one branch can be tried."
        raise own.refusal(model, seen, "write it with keras.ops.where for each sample, or without.")
    with trials.unchanged(model):
        return certificates.certify(model, TensorFlowTrial(model, form), batch)


def _trace(model: Any, data: Any) -> str:
    """Traces the step, which creates its variables; returns the name of a condition in it, or ""."""

    def step(data: Any) -> None:
        graph = tf.compat.v1.get_default_graph()

        def handed(gradients: list[Any], variables: list[Any], apply: Any) -> None:
            if tf.compat.v1.get_default_graph() is not graph:
                fix = f"update in every step. {certificates.LEAVE_IT}"
                raise own.refusal(model, "it updates under a condition.", fix)

        with (
            trials.other_optimizers(model),
            interception.intercepted(model.optimizer, handed),
            inlined_functions(),
        ):
            model.train_step(data)

    try:
        traced = tf.function(tf.autograph.experimental.do_not_convert(step)).get_concrete_function(data)
    except CustomTrainStepError:
        raise
    except Exception as error:
        seen = f"it could not be traced with seven samples of the first batch: {type(error).__name__}: {error}"
        fix = "use operations of keras.ops or TensorFlow, so that it compiles; and " + certificates.NUMBER_OF_SAMPLES
        raise own.refusal(model, seen, fix) from error
    definition = traced.graph.as_graph_def()
    nodes = [*definition.node, *(node for function in definition.library.function for node in function.node_def)]
    return next((str(node.name) for node in nodes if node.op in _CONDITIONS), "")


_CONDITIONS = ("If", "StatelessIf", "Case", "StatelessCase")


class TensorFlowTrial:
    """Runs the step eagerly, operation by operation."""

    hands_on_grad = False

    def __init__(self, model: Any, form: int) -> None:
        self.model, self.form = model, form
        self.rules = RULES

    def run(self, batch: Any, draws: Any, share: float, change_of_weights: float = 0.0, **how: Any) -> certificates.Run:
        recording = Recording(self.rules)
        data = _tensors(batch, self.form)
        recorder = _Recorder(recording)
        recorder.mark([leaf for leaf in tree.flatten(data) if leaf is not None])
        own_functions = tf.config.functions_run_eagerly()
        tf.config.run_functions_eagerly(True)
        try:
            with trials.other_weights(self.model, change_of_weights), _drawn_from(draws, recorder), recorder:
                found = trials.run(self.model, data, recording, recorder.stop, _key, _dense, float(share), **how)
                trials.check_writes(self.model, recorder.wrote)
                return found
        finally:
            tf.config.run_functions_eagerly(own_functions)


def _tensors(batch: Any, form: int) -> Any:
    return interception.packed(
        tree.map_structure(lambda leaf: None if leaf is None else tf.convert_to_tensor(leaf), batch), form
    )


def _key(tensor: Any) -> Any:
    return id(tensor)


def _dense(gradient: Any) -> Any:
    return None if gradient is None else tf.convert_to_tensor(gradient)


class _Recorder:
    """Records TensorFlow's eager operations inside the `with` block."""

    def __init__(self, recording: Recording) -> None:
        self.recording = recording
        self._kept: list[Any] = []  # kept alive, so that no id is used twice
        self.wrote: list[str] = []
        self._is_on = False

    def __enter__(self) -> _Recorder:
        self._is_on = True
        op_callbacks.add_op_callback(self._note)
        return self

    def __exit__(self, *error: Any) -> None:
        op_callbacks.remove_op_callback(self._note)

    def stop(self) -> None:
        self._is_on = False

    def mark(self, values: list[Any]) -> None:
        self._kept.append(values)
        self.recording.mark([id(value) for value in values])

    def _note(
        self, op_type: Any, inputs: Any, attrs: Any, outputs: Any, op_name: Any = None, graph: Any = None
    ) -> None:
        name = op_type.decode() if isinstance(op_type, bytes) else op_type
        if name.startswith(("Assign", "ResourceScatter")):  # not by Keras, whose assignments stay in the scope
            self.wrote.append(name)
        if not self._is_on or graph is not None:
            return
        self._kept += [inputs, outputs]
        writes = inputs[:1] if name.startswith(("Assign", "Resource")) else ()
        if name == "Cast" and not outputs[0].dtype.is_floating:
            name = "Cast to integers"
        precision = outputs[0].dtype.name if outputs else ""
        self.recording.add(name, _shaped(inputs), _shaped(outputs), [id(value) for value in writes], precision)


def _shaped(values: Any) -> list[tuple[Any, Any]]:
    return [(id(value), tuple(value.shape) if hasattr(value, "shape") else ()) for value in values]


@contextlib.contextmanager
def _drawn_from(draws: Any, recorder: _Recorder) -> Iterator[None]:
    """Replaces the results of random operations by those of `draws`, in the block."""

    def held(draw: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            value = draw(*args, **kwargs)
            held = tf.constant(draws.next(value.numpy()), value.dtype)
            recorder.mark([held])
            return held

        return call

    modules = (gen_random_ops, gen_stateful_random_ops, gen_stateless_random_ops, gen_stateless_random_ops_v2)
    with contextlib.ExitStack() as stack:
        for module in modules:
            names = [name for name in vars(module) if name.startswith(_DRAWS) and not name.endswith(_NO_DRAWS)]
            stack.enter_context(replaced(module, {name: held(getattr(module, name)) for name in names}))
        yield


_DRAWS = (
    "multinomial", "parameterized_truncated", "random_gamma", "random_poisson", "random_shuffle", "random_standard",
    "random_uniform", "truncated_normal", "stateless_random", "stateless_shuffle", "stateless_truncated",
    "stateless_multinomial", "stateless_parameterized", "stateful_", "non_deterministic",
)  # fmt: skip
_NO_DRAWS = ("_eager_fallback", "_grad", "get_alg", "get_key_counter", "get_key_counter_alg")

RULES = Rules(
    linear=frozenset(
        "Add AddV2 AddN AccumulateNV2 Sub Neg Cast Identity IdentityN Reshape Sum Mean Pack Unpack Concat ConcatV2 "
        "Transpose Squeeze ExpandDims Tile BroadcastTo Fill ZerosLike OnesLike Pad PadV2 "
        "StopGradient PreventGradient Split SplitV Snapshot CheckNumerics ReadVariableOp "
        "EnsureShape DeepCopy Real BiasAddGrad StridedSliceGrad Copy ReverseV2".split()
    ),
    products=frozenset("Mul MatMul BatchMatMul BatchMatMulV2 BatchMatMulV3 Einsum MulNoNan".split()),
    linear_in=positions(
        "RealDiv Div DivNoNan Xdivy Slice StridedSlice Gather GatherV2 UnsortedSegmentSum SegmentSum "
        "ReluGrad Relu6Grad LeakyReluGrad EluGrad SeluGrad SoftplusGrad SoftsignGrad",
        "TanhGrad SigmoidGrad SqrtGrad RsqrtGrad ReciprocalGrad InvGrad",
        "Conv2DBackpropInput Conv2DBackpropFilter Conv3DBackpropInputV2 Conv3DBackpropFilterV2",
    ),
    choices=frozenset("Select SelectV2".split()),
    reductions=frozenset(
        "Sum Mean MatMul BatchMatMul BatchMatMulV2 BatchMatMulV3 Einsum UnsortedSegmentSum SegmentSum AddN "
        "Reshape Squeeze".split()
    ),
    only_shapes=frozenset("Shape ShapeN Size Rank ZerosLike OnesLike BroadcastGradientArgs BroadcastArgs".split()),
)
