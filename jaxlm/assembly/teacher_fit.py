"""Binds a teacher to a run: finds its head, its layers and its precision, and refuses what doesn't fit."""

import dataclasses
from typing import Any

from jaxlm.assembly.distillation import Distillation
from jaxlm.assembly.model_source import Source
from jaxlm.assembly.run_objective import BoundObjective
from jaxlm.core import config, registry, spec, tree
from jaxlm.models.model import Model
from jaxlm.nn.family import RunsItself
from jaxlm.nn.layout import Layout
from jaxlm.objectives import OBJECTIVES
from jaxlm.weights import quantized


def bound(run: config.Run, source: Source, objective: BoundObjective, student: Model) -> Distillation:
    """Binds a teacher, by its files, to a run. ValueError: the two don't fit each other, or the settings don't."""
    c, place = run.distill, run.distill.teacher
    _check_settings(run, objective)
    mine, theirs = student.family, source.family
    if mine.kind != theirs.kind:
        raise ValueError(
            f"distill.teacher: {place} is of kind {theirs.kind} and the run's model of kind {mine.kind}; they read "
            "different rows, so choose a teacher of the same kind"
        )
    check_tokenizers(place, source.tokens, objective.tokenizer)
    longest = max(run.train.seq_len, objective.target_positions)
    if source.config.positions is not None and longest > source.config.positions:
        raise ValueError(
            f"distill.teacher: {place} reads {source.config.positions} positions, and rows have {longest}; lower "
            "train.seq_len"
        )
    settings, order = _head(run, source)
    pairs, layers = _layer_pairs(run, source.config.layers), _relation_layers(run, source.config.layers)
    if c.losses != ("logits",):
        _check_states(run, source, student)
    heads = c.relations.heads or source.config.heads
    if "relations" in c.losses:
        _check_heads(heads, run, {"the run's model": student.specs, place: source.adapted.base})
    own = bool(OBJECTIVES.of(run.objective).specs(run.objective, run.model.width))
    model, specs = _teacher(run, source, settings)
    return Distillation(
        c, source, model, specs, settings, order, pairs, layers, heads, (run.model.width, source.config.width),
        None if own else objective.vocab_size,
    )  # fmt: skip


def _teacher(run: config.Run, source: Source, settings: Any) -> tuple[Model, Any]:
    """Returns the teacher on the run's mesh, and the specs of its weights as they are stored."""
    c = run.distill
    dtype = run.execution.dtype if c.dtype == "run" else c.dtype
    execution = dataclasses.replace(run.execution, dtype=dtype, remat="none", offload=(), matmul="dtype")
    adapter = source.adapter
    if c.base not in ("float32", adapter.base):
        if adapter.base != "float32" or source.adapted.compressed:
            raise ValueError(f"distill.base: the matrices of {c.teacher} are stored in few bits already; leave it out")
        adapter = dataclasses.replace(adapter, base=c.base)
    adapted = dataclasses.replace(source.adapted, c=adapter)
    specs = dict(source.adapted.specs())
    if adapter.base != source.adapter.base:
        if not adapted.matrices:
            raise ValueError(f"distill.base: no matrices of {c.teacher} could be stored as {c.base}; use float32")
        for path, m in adapted.matrices.items():
            specs = tree.put(specs, path, quantized.specs(m.spec, m.ins, m.outs, c.base))
    head = {} if settings is None else OBJECTIVES.of(settings).specs(settings, source.config.width)
    layout = Layout.of(run.mesh, execution)
    plain = adapted.base | head
    return Model(source.family, source.config, plain, layout, adapted if adapted.changes else None), specs | head


def _check_settings(run: config.Run, objective: BoundObjective) -> None:
    """Raises ValueError where settings of distillation contradict each other, or other parts of the run."""
    c = run.distill
    if not c.losses or len(set(c.losses)) < len(c.losses):
        raise ValueError("distill.losses: must name at least one of logits, hidden and relations, and none twice")
    if "logits" in c.losses and objective.objective.outputs is None:
        raise ValueError(
            f"distill.losses: logits compare predictions, and {objective.name} offers none to compare; choose hidden "
            "or relations"
        )
    if c.cache and c.losses != ("logits",):
        raise ValueError(
            "distill.cache: holds logits, and the teacher must read each batch for its states; leave the cache out"
        )
    if c.cache and c.on_policy.share:
        raise ValueError("distill.cache: can't hold logits of texts that are yet to be written; leave it out")
    if run.distributed.method != "none":
        raise ValueError(
            f"distill.teacher: workers that train apart (distributed.method {run.distributed.method}) have none; "
            "leave one of the two out"
        )
    if c.on_policy.share and "logits" not in c.losses:
        raise ValueError("distill.on_policy.share: own texts teach nothing without logits in distill.losses; add them")
    if c.on_policy.share and (objective.writes is None or run.continual.methods):
        other = f"{objective.name} has no rows that a model could write"
        if objective.writes is not None:
            other = "batches with rows of earlier tasks (continual.methods) are not written by the student"
        raise ValueError(f"distill.on_policy.share: {other}; set it to 0")


def check_tokenizers(place: str, theirs: Any, mine: Any) -> None:
    """Compares two tokenizers by the text that each token stands for, however their files spell it. ValueError: they
    differ."""
    remedy = "teacher and student need one tokenizer: name the teacher's as data.tokenizer, or start from its family"
    if theirs is None:
        raise ValueError(f"distill.teacher: {place} has no tokenizer; put its tokenizer.json beside the weights")
    if theirs.vocab_size != mine.vocab_size:
        raise ValueError(
            f"distill.teacher: the tokenizer of {place} has {theirs.vocab_size} tokens and the run's "
            f"{mine.vocab_size}; {remedy}"
        )
    for i, (there, here) in enumerate(zip(theirs.token_bytes, mine.token_bytes, strict=True)):
        if there != here:
            said = [text.decode("utf-8", "replace") for text in (there, here)]
            raise ValueError(
                f"distill.teacher: token {i} is {said[0]!r} in {place} and {said[1]!r} in the run; {remedy}"
            )


def _head(run: config.Run, source: Source) -> tuple[Any, tuple[int, ...] | None]:
    """Returns the settings by which the teacher's predictions are read, and where each class of the run stands among
    the teacher's. (None, None): nobody reads them. ValueError: it has no such
    head, or one for other classes."""
    objective, place = OBJECTIVES.of(run.objective), run.distill.teacher
    name = registry.name_of(run.objective)
    if "logits" not in run.distill.losses:
        return None, None
    if not objective.specs(run.objective, run.model.width):
        if not source.config.head:
            raise ValueError(
                f"distill.teacher: {place} has no head that predicts tokens, which {name} compares; choose hidden or "
                "relations in distill.losses"
            )
        return run.objective, None
    theirs = source.objective
    if type(theirs) is not type(run.objective):
        raise ValueError(
            f"distill.teacher: {place} has no head for {name}; fine-tune it for {name} first, or choose hidden or "
            "relations in distill.losses"
        )
    if objective.head is None:
        labels = [tuple(dict(vars(o)).get("labels", ())) for o in (run.objective, theirs)]
        kinds = ["", ""]
    else:
        written = [objective.head.write(o) for o in (run.objective, theirs)]
        labels, kinds = [w.labels for w in written], [w.problem_type for w in written]
    if kinds[0] != kinds[1] or sorted(labels[0]) != sorted(labels[1]):
        said = [f"{kind} {','.join(of[:6])}".strip() for kind, of in zip(kinds, labels, strict=True)]
        raise ValueError(
            f"distill.teacher: the head of {place} is for {said[1]} and the run's for {said[0]}; teach with a model of "
            "the same labels"
        )
    if labels[0] == labels[1]:
        return theirs, None
    return theirs, tuple(labels[1].index(label) for label in labels[0])


def _layer_pairs(run: config.Run, layers: int) -> tuple[tuple[int, int], ...]:
    """Returns the pairs of layers whose states are compared. ValueError: there are no such layers."""
    if "hidden" not in run.distill.losses:
        return ()
    mine, out = run.model.layers, []
    if not run.distill.hidden.layers:
        return (
            tuple((i, round((i + 1) * layers / mine) - 1) for i in range(mine))
            if mine <= layers
            else tuple((round((i + 1) * mine / layers) - 1, i) for i in range(layers))
        )
    for text in run.distill.hidden.layers:
        a, sign, b = text.partition("=")
        if not (sign and a.isdecimal() and b.isdecimal()):
            raise ValueError(f"distill.hidden.layers: {text!r} is not STUDENT=TEACHER, such as 0=1")
        out.append((int(a), int(b)))
        for side, at, count in (("student", int(a), mine), ("teacher", int(b), layers)):
            if at >= count:
                raise ValueError(
                    f"distill.hidden.layers: {text}: the {side} has layers 0 to {count - 1}; name one of them"
                )
    return tuple(out)


def _relation_layers(run: config.Run, layers: int) -> tuple[int, int]:
    """Returns the layers whose relations are compared. ValueError: there are no such layers."""
    c, out = run.distill.relations, []
    for field, at, count in (("layer", c.layer, run.model.layers), ("teacher_layer", c.teacher_layer, layers)):
        if at is not None and at >= count and "relations" in run.distill.losses:
            raise ValueError(f"distill.relations.{field}: {at} is no layer of {count}; give 0 to {count - 1}")
        out.append(count - 1 if at is None else at)
    return out[0], out[1]


def _check_states(run: config.Run, source: Source, student: Model) -> None:
    """Raises ValueError where states of layers can't be had of one of the two models."""
    for side, family in (("the run's model", student.family), (run.distill.teacher, source.family)):
        if isinstance(family, RunsItself) or family.kind == "encoder_decoder":
            what = "runs its layers itself" if isinstance(family, RunsItself) else "has two stacks of layers"
            raise ValueError(f"distill.losses: {side} {what}, whose states aren't compared; choose logits alone")
    if run.mesh.stage != 1:
        raise ValueError("distill.losses: states of single layers don't leave pipeline stages; set mesh.stage to 1")


def _check_heads(heads: int, run: config.Run, sides: dict[str, Any]) -> None:
    """Raises ValueError where queries, keys or values of a side aren't there, or don't divide into that many relation
    heads."""
    for side, specs in sides.items():
        flat = tree.flatten(specs, spec.is_spec)
        for name in run.distill.relations.of:
            found = [s for path, s in flat.items() if path.rpartition("/")[2] == name and "layers" in s.axes]
            if not found:
                raise ValueError(
                    f"distill.losses: the attention of {side} has no {name} of its own to relate; leave relations out"
                )
            width = found[0].shape[-1] * found[0].shape[-2]
            if width % heads:
                raise ValueError(
                    f"distill.relations.heads: {heads} do not divide the {width} numbers of {name} in {side}; give a "
                    "divisor"
                )
