"""Writes and compiles the machine code of `few_bit_matmul` by llvmlite: handlers that XLA calls on a CPU.

A handler reads what XLA hands it, in the structures of `xla/ffi/api/c_api.h`, multiplies a part of the outputs at a
time, and lets XLA's own threads take parts too. It keeps nothing between calls, so that any number of threads may be in
it at once.

R rows, I inputs, O outputs, G groups of inputs.
"""

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from llvmlite import binding, ir

LANES = 16  # numbers of a vector; LLVM cuts it into as many registers as the machine needs
AT_ONCE = 8  # inputs that are added to an output between reading and writing it
ROWS = (4, 2, 1)  # rows that share one reading of the matrix
STRIP = 512  # the most outputs of a part: what is added up for several rows of them lies in the first cache
NUMBERS = 1 << 16  # of a matrix, in a part that is worth another thread's while
SPINS = 2000  # looks at whether other threads are done before one gives its core away

BIT, BYTE, SHORT, INT, WORD = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
FLOAT = ir.FloatType()
POINTER, NOTHING = ir.PointerType(), ir.VoidType()
F32, S8, U8, BF16, S64 = 11, 2, 6, 16, 5  # numbers of XLA's types

# Places of fields, in words of 8 bytes, of the structures that XLA hands over.
FRAME_EXTENSION, FRAME_API, FRAME_CONTEXT, FRAME_STAGE = 1, 2, 3, 4
ARGUMENTS, ARGUMENT = 7, 9
RESULTS, RESULT = 12, 14
ATTRIBUTES, ATTRIBUTE_TYPES, ATTRIBUTE = 17, 18, 20
FRAME_BYTES, BUFFER_BYTES = 168, 48
BUFFER_TYPE, BUFFER_DATA, BUFFER_RANK, BUFFER_DIMS = 2, 3, 4, 5
CREATE_ERROR, DESTROY_ERROR, SCHEDULE, COUNT_THREADS = 6, 8, 17, 18  # functions of its table
METADATA, METADATA_VERSION, METADATA_TRAITS = 3, 3, 4
EXECUTE, SCALAR, INVALID_ARGUMENT = 3, 3, 3

# Words of the record that threads share; the first four change.
NEXT, DONE, USERS, PARTS, COLUMNS, X, W, SCALE, ZERO, Y, R, I, O, GROUP, G = range(15)  # noqa: E741
FIELDS = 16

OPERANDS = {"int8": (("x", F32, 2), ("codes", S8, 2), ("scale", F32, 1)),
            "int4": (("x", F32, 2), ("codes", U8, 2), ("scale", BF16, 2), ("zero", U8, 2))}  # fmt: skip
"""Names, XLA's types and ranks of the operands of each product."""


def handlers(version: tuple[int, int], most_rows: int) -> dict[str, Any]:
    """Returns capsules with the addresses of handlers of int8 and int4 for up to `most_rows` rows, compiled for this
    processor, which say that they were written for this version of XLA's interface."""
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    module = ir.Module("few_bit_matmul")
    for kind in OPERANDS:
        _handler(module, kind, _task(module, kind, _strip(module, kind, most_rows)), version, most_rows)
    target, features = binding.Target.from_default_triple(), binding.get_host_cpu_features().flatten()
    machine = target.create_target_machine(cpu=binding.get_host_cpu_name(), features=features, opt=3, jit=True)
    module.triple = machine.triple
    parsed = binding.parse_assembly(str(module))
    parsed.verify()
    options = binding.create_pipeline_tuning_options(speed_level=2)
    options.loop_vectorization = options.slp_vectorization = options.loop_unrolling = False  # done here by hand
    passes = binding.create_pass_builder(machine, options)
    passes.getModulePassManager().run(parsed, passes)
    engine = binding.create_mcjit_compiler(parsed, machine)
    engine.finalize_object()
    addresses = {kind: engine.get_function_address(f"{kind}_handler") for kind in OPERANDS}
    engine.detach()  # nothing gives the code's memory back: XLA's threads may be in it until the process has ended
    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    return {kind: new(address, None, None) for kind, address in addresses.items()}


# ---------------------------------------------------------------------------------------------------- writing functions


class _Code(ir.IRBuilder):
    """A function that is being written."""

    @classmethod
    def of(cls, module: ir.Module, name: str, result: Any, arguments: Sequence[Any], exported: bool = False) -> Any:
        """Begins a function; returns it and its code."""
        f = ir.Function(module, ir.FunctionType(result, arguments), name)
        if not exported:
            f.linkage = "internal"
        return f, cls(f.append_basic_block())

    @staticmethod
    def word(n: int) -> Any:
        return ir.Constant(WORD, n)

    @contextmanager
    def loop(self, start: Any, stop: Any, step: int = 1) -> Iterator[Any]:
        """Repeats what is written within for whole numbers from `start` to before `stop`."""
        before, head = self.block, self.append_basic_block()
        body, after = self.append_basic_block(), self.append_basic_block()
        self.branch(head)
        self.position_at_end(head)
        i = self.phi(WORD)
        i.add_incoming(start, before)
        self.cbranch(self.icmp_signed("<", i, stop), body, after)
        self.position_at_end(body)
        yield i
        i.add_incoming(self.add(i, self.word(step)), self.block)
        self.branch(head)
        self.position_at_end(after)

    def at(self, base: Any, i: Any, kind: Any) -> Any:
        """Returns where the `i`-th number from `base` on lies."""
        return self.gep(base, [self.word(i) if isinstance(i, int) else i], source_etype=kind)

    def read(self, base: Any, i: Any, kind: Any = WORD, lanes: int = 1) -> Any:
        """Reads the `i`-th number from `base` on, or several from there on as a vector."""
        whole = ir.VectorType(kind, lanes) if lanes > 1 else kind
        return self.load(self.at(base, i, kind), typ=whole, align=kind.width // 8 if kind != FLOAT else 4)

    def write(self, value: Any, base: Any, i: Any, kind: Any = WORD) -> None:
        self.store(value, self.at(base, i, kind), align=kind.width // 8 if kind != FLOAT else 4)

    def room(self, kind: Any, count: int = 1) -> Any:
        """Makes room for numbers on the stack of the function."""
        made = self.alloca(kind, count)
        made.type = POINTER
        return made

    def pointer(self, base: Any, i: Any) -> Any:
        return self.load(self.at(base, i, WORD), typ=POINTER, align=8)

    def spread(self, value: Any, lanes: int) -> Any:
        """Returns a vector of one number."""
        if lanes == 1:
            return value
        anything = ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined)
        one = self.insert_element(anything, value, ir.Constant(INT, 0))
        return self.shuffle_vector(one, anything, ir.Constant(ir.VectorType(INT, lanes), [0] * lanes))

    def as_float(self, codes: Any, signed: bool, mask: int | None = None) -> Any:
        """Returns whole numbers of few bits as float32; with a mask, their lowest bits."""
        lanes = codes.type.count if isinstance(codes.type, ir.VectorType) else 1
        wide, result = (ir.VectorType(k, lanes) if lanes > 1 else k for k in (INT, FLOAT))
        n = self.sext(codes, wide) if signed else self.zext(codes, wide)
        if mask is not None:
            n = self.and_(n, self.spread(ir.Constant(INT, mask), lanes))
        return self.sitofp(n, result)

    def of_bfloat16(self, bits: Any) -> Any:
        """Returns bfloat16 numbers as float32."""
        lanes = bits.type.count if isinstance(bits.type, ir.VectorType) else 1
        wide, result = (ir.VectorType(k, lanes) if lanes > 1 else k for k in (INT, FLOAT))
        return self.bitcast(self.shl(self.zext(bits, wide), self.spread(ir.Constant(INT, 16), lanes)), result)

    def times_plus(self, a: Any, b: Any, c: Any) -> Any:
        """Returns a · b + c, fused where the processor can."""
        lanes = f"v{a.type.count}" if isinstance(a.type, ir.VectorType) else ""
        return self.call(_library(self.module, f"llvm.fmuladd.{lanes}f32", a.type, a.type, a.type, a.type), [a, b, c])

    def least(self, a: Any, b: Any) -> Any:
        return self.select(self.icmp_signed("<", a, b), a, b)

    def most(self, a: Any, b: Any) -> Any:
        return self.select(self.icmp_signed(">", a, b), a, b)

    def whole(self, n: Any, of: int) -> Any:
        """Returns the largest multiple of a power of two that isn't above `n`."""
        return self.and_(n, self.word(-of))


def _over_columns(b: _Code, n: Any, one: Any) -> None:
    """Writes `one(j, lanes)` for all of `n` columns: vectors, then what is left one by one."""
    whole = b.whole(n, LANES)
    with b.loop(b.word(0), whole, LANES) as j:
        one(j, LANES)
    with b.loop(whole, n) as j:
        one(j, 1)


# --------------------------------------------------------------------------------------------------------- the products


def _add_products(module: ir.Module, kind: str, rows: int, inputs: int) -> Any:
    """Writes a function that adds the products of `rows` rows with `inputs` inputs to `n` sums of each.

    Its arguments are the sums and the numbers between two rows of them, x and the same, codes and the numbers from one
    row of codes to the next, n, and whether the last input is there.
    """
    name, arguments = f"{kind}_{rows}_{inputs}", [POINTER, WORD, POINTER, WORD, POINTER, WORD, WORD, BIT]
    f, b = _Code.of(module, name, NOTHING, arguments)
    sums, between, x, x_between, codes, next_codes, n, complete = f.args
    for pointer in (sums, x, codes):
        pointer.add_attribute("noalias")
    factors = []
    for r in range(rows):
        row = b.at(x, b.mul(b.word(r), x_between), FLOAT)
        if kind == "int8":
            factors.append([b.read(row, k, FLOAT) for k in range(inputs)])
            continue
        own = []
        for k in range(0, inputs, 2):
            # A byte is 16 · first + second: with x₀ / 16 for the byte, the second gets x₁ − x₀ / 16.
            first = b.fmul(b.read(row, k, FLOAT), ir.Constant(FLOAT, 1 / 16))
            at = b.select(complete, b.word(k + 1), b.word(k))
            second = b.select(complete, b.read(row, at, FLOAT), ir.Constant(FLOAT, 0.0))
            own += [first, b.fsub(second, first)]
        factors.append(own)

    def one(j: Any, lanes: int) -> None:
        numbers = []
        for k in range(inputs if kind == "int8" else inputs // 2):
            read = b.read(b.at(codes, b.mul(b.word(k), next_codes), BYTE), j, BYTE, lanes)
            numbers.append(b.as_float(read, kind == "int8"))
            if kind == "int4":
                numbers.append(b.as_float(read, False, 15))
        for r in range(rows):
            own = b.at(sums, b.mul(b.word(r), between), FLOAT)
            y = b.read(own, j, FLOAT, lanes)
            for factor, number in zip(factors[r], numbers, strict=True):
                y = b.times_plus(b.spread(factor, lanes), number, y)
            b.write(y, own, j, FLOAT)

    _over_columns(b, n, one)
    b.ret_void()
    return f


def _strip(module: ir.Module, kind: str, most_rows: int) -> Any:
    """Writes a function of the shared record, the first of at most `STRIP` outputs and how many they are, which
    multiplies all rows with them."""
    tail = 1 if kind == "int8" else 2
    products = {(r, k): _add_products(module, kind, r, k) for r in ROWS for k in (AT_ONCE, tail)}
    f, b = _Code.of(module, f"{kind}_strip", NOTHING, [POINTER, WORD, WORD])
    record, first, n = f.args
    x = b.pointer(record, X)
    rows, inputs, outputs = (b.read(record, place) for place in (R, I, O))
    codes, y = b.at(b.pointer(record, W), first, BYTE), b.at(b.pointer(record, Y), first, FLOAT)

    def some(sums: Any, between: Any, k: Any, count: int, complete: Any) -> None:
        """Adds the products of `count` inputs from `k` on; `complete` says whether there are as many."""
        own_codes = b.at(codes, b.mul(k if kind == "int8" else b.lshr(k, b.word(1)), outputs), BYTE)
        done = b.word(0)
        for r in ROWS:
            until = rows if r == 1 else b.add(done, b.whole(b.sub(rows, done), r))
            with b.loop(done, until, r) as row:
                own, own_x = b.at(sums, b.mul(row, between), FLOAT), b.at(x, b.add(b.mul(row, inputs), k), FLOAT)
                b.call(products[r, count], [own, between, own_x, inputs, own_codes, outputs, n, complete])
            done = until

    def add(sums: Any, between: Any, begin: Any, end: Any) -> None:
        """Adds the products of inputs from `begin` to before `end`."""
        whole = b.add(begin, b.whole(b.sub(end, begin), AT_ONCE))
        with b.loop(begin, whole, AT_ONCE) as k:
            some(sums, between, k, AT_ONCE, ir.Constant(BIT, 1))
        with b.loop(whole, end, tail) as k:
            some(sums, between, k, tail, b.icmp_signed("<=", b.add(k, b.word(tail)), end))

    with b.loop(b.word(0), rows) as r:
        _fill(b, b.at(y, b.mul(r, outputs), FLOAT), ir.Constant(FLOAT, 0.0), n)
    if kind == "int4":
        _in_groups(b, record, first, n, y, b.room(FLOAT, STRIP * most_rows), add)
    else:
        add(y, outputs, b.word(0), inputs)
        scale = b.at(b.pointer(record, SCALE), first, FLOAT)
        with b.loop(b.word(0), rows) as r:
            row = b.at(y, b.mul(r, outputs), FLOAT)

            def scaled(j: Any, lanes: int) -> None:
                b.write(b.fmul(b.read(row, j, FLOAT, lanes), b.read(scale, j, FLOAT, lanes)), row, j, FLOAT)

            _over_columns(b, n, scaled)
    b.ret_void()
    return f


def _fill(b: _Code, row: Any, value: Any, n: Any) -> None:
    _over_columns(b, n, lambda j, lanes: b.write(b.spread(value, lanes), row, j, FLOAT))


def _in_groups(
    b: _Code, record: Any, first: Any, n: Any, y: Any, sums: Any, add: Callable[[Any, Any, Any, Any], None]
) -> None:
    """Writes how the sums of each group of inputs, which begin with what the zero points take away, are multiplied by
    the group's scales and added to the outputs."""
    x, scale, zero = (b.pointer(record, place) for place in (X, SCALE, ZERO))
    rows, inputs, outputs, group, groups = (b.read(record, place) for place in (R, I, O, GROUP, G))
    total = b.room(FLOAT)
    has_zeros = b.icmp_unsigned("!=", zero, ir.Constant(POINTER, None))
    with b.loop(b.word(0), groups) as g:
        begin, at = b.mul(g, group), b.add(b.mul(g, outputs), first)
        end = b.least(inputs, b.add(begin, group))
        own_zero, own_scale = b.at(zero, at, BYTE), b.at(scale, at, SHORT)
        with b.loop(b.word(0), rows) as r:
            own, own_x = b.at(sums, b.mul(r, b.word(STRIP)), FLOAT), b.at(x, b.mul(r, inputs), FLOAT)
            b.store(ir.Constant(FLOAT, 0.0), total)
            with b.loop(begin, end) as k:
                b.store(b.fadd(b.load(total, typ=FLOAT), b.read(own_x, k, FLOAT)), total)
            minus = b.fneg(b.load(total, typ=FLOAT))

            def less(j: Any, lanes: int) -> None:
                counted_from = b.as_float(b.read(own_zero, j, BYTE, lanes), False)
                b.write(b.fmul(b.spread(minus, lanes), counted_from), own, j, FLOAT)

            with b.if_else(has_zeros) as (given, middle):
                with given:
                    _over_columns(b, n, less)
                with middle:
                    _fill(b, own, b.fmul(minus, ir.Constant(FLOAT, 8.0)), n)
        add(sums, b.word(STRIP), begin, end)
        with b.loop(b.word(0), rows) as r:
            own, row = b.at(sums, b.mul(r, b.word(STRIP)), FLOAT), b.at(y, b.mul(r, outputs), FLOAT)

            def scaled(j: Any, lanes: int) -> None:
                factor = b.of_bfloat16(b.read(own_scale, j, SHORT, lanes))
                b.write(b.times_plus(b.read(own, j, FLOAT, lanes), factor, b.read(row, j, FLOAT, lanes)), row, j, FLOAT)

            _over_columns(b, n, scaled)


# ---------------------------------------------------------------------------------------------------------- the threads


def _library(module: ir.Module, name: str, result: Any, *arguments: Any) -> Any:
    found = module.globals.get(name)
    return ir.Function(module, ir.FunctionType(result, arguments), name) if found is None else found


def _task(module: ir.Module, kind: str, strip: Any) -> Any:
    """Writes what each thread does: parts of the record until none is left. The last to leave gives the record back."""
    f, b = _Code.of(module, f"{kind}_task", NOTHING, [POINTER])
    (record,) = f.args
    look, work, leave, last, end = (b.append_basic_block() for _ in range(5))
    b.branch(look)
    b.position_at_end(look)
    part = b.atomic_rmw("add", b.at(record, NEXT, WORD), b.word(1), "seq_cst")
    b.cbranch(b.icmp_signed("<", part, b.read(record, PARTS)), work, leave)
    b.position_at_end(work)
    columns = b.read(record, COLUMNS)
    first = b.mul(part, columns)
    b.call(strip, [record, first, b.least(columns, b.sub(b.read(record, O), first))])
    b.atomic_rmw("add", b.at(record, DONE, WORD), b.word(1), "seq_cst")
    b.branch(look)
    b.position_at_end(leave)
    users = b.atomic_rmw("sub", b.at(record, USERS, WORD), b.word(1), "seq_cst")
    b.cbranch(b.icmp_signed("==", users, b.word(1)), last, end)
    b.position_at_end(last)
    b.call(_library(module, "free", NOTHING, POINTER), [record])
    b.branch(end)
    b.position_at_end(end)
    b.ret_void()
    return f


def _handler(module: ir.Module, kind: str, task: Any, version: tuple[int, int], most_rows: int) -> None:
    """Writes the function that XLA calls with a frame; it returns an error, or a null pointer."""
    f, b = _Code.of(module, f"{kind}_handler", POINTER, [POINTER], exported=True)
    (frame,) = f.args
    null = ir.Constant(POINTER, None)
    with b.if_then(b.icmp_unsigned("!=", b.pointer(frame, FRAME_EXTENSION), null)):
        # It is being registered, and asked for the version of the interface that it was written for.
        metadata = b.pointer(b.pointer(frame, FRAME_EXTENSION), METADATA)
        b.write(b.word(version[1] << 32 | version[0]), metadata, METADATA_VERSION)
        b.write(ir.Constant(INT, 0), metadata, 2 * METADATA_TRAITS, INT)
        b.ret(null)
    api, context = b.pointer(frame, FRAME_API), b.pointer(frame, FRAME_CONTEXT)
    refuse = b.append_basic_block()
    known = _checked(b, kind, frame, most_rows, refuse)
    record = b.call(_library(module, "malloc", POINTER, WORD), [b.word(8 * FIELDS)])
    _demand(b, b.icmp_unsigned("!=", record, null), refuse)
    for place, value in known.items():
        b.store(value, b.at(record, place, WORD), align=8)
    _share(b, record, task, api, context)
    b.ret(null)

    b.position_at_end(refuse)
    text = bytearray(f"jaxlm's {kind} product: operands aren't those that it was written for\0".encode())
    message = ir.GlobalVariable(module, ir.ArrayType(BYTE, len(text)), f"{kind}_message")
    message.initializer, message.global_constant = ir.Constant(message.value_type, text), True
    message.linkage, message.type = "internal", POINTER
    asked = b.room(WORD, 4)
    b.write(b.word(28), asked, 0)
    b.write(b.word(0), asked, 1)
    b.store(message, b.at(asked, 2, WORD), align=8)
    b.write(b.word(INVALID_ARGUMENT), asked, 3)
    b.ret(_call(b, b.pointer(api, CREATE_ERROR), asked))


def _demand(b: _Code, condition: Any, refuse: Any) -> None:
    """Goes on where the condition holds, else to `refuse`."""
    good = b.append_basic_block()
    b.cbranch(condition, good, refuse)
    b.position_at_end(good)


def _checked(b: _Code, kind: str, frame: Any, most_rows: int, refuse: Any) -> dict[int, Any]:
    """Reads a call's frame; returns what the record has of it, by its place there. Numbers, types and dimensions of
    operands are compared with those that the product is written for."""

    def equal(found: Any, n: Any) -> None:
        _demand(b, b.icmp_signed("==", found, b.word(n) if isinstance(n, int) else n), refuse)

    def number(base: Any, word: int) -> Any:
        """Reads an enumerated value, which has half a word."""
        return b.zext(b.read(base, 2 * word, INT), WORD)

    def buffer(base: Any, i: int, dtype: int, rank: int) -> tuple[Any, list[Any]]:
        found = b.pointer(base, i)
        _demand(b, b.icmp_signed(">=", b.read(found, 0), b.word(BUFFER_BYTES)), refuse)
        equal(number(found, BUFFER_TYPE), dtype)
        equal(b.read(found, BUFFER_RANK), rank)
        dims = b.pointer(found, BUFFER_DIMS)
        return b.pointer(found, BUFFER_DATA), [b.read(dims, at) for at in range(rank)]

    _demand(b, b.icmp_signed(">=", b.read(frame, 0), b.word(FRAME_BYTES)), refuse)
    equal(number(frame, FRAME_STAGE), EXECUTE)
    operands = OPERANDS[kind]
    for place, count in ((ARGUMENTS, len(operands)), (RESULTS, 1), (ATTRIBUTES, 1)):
        equal(b.read(frame, place), count)
    found = [buffer(b.pointer(frame, ARGUMENT), i, dtype, rank) for i, (_, dtype, rank) in enumerate(operands)]
    (x, (rows, inputs)), (codes, (code_rows, code_outputs)), (scale, scale_dims), *others = found
    y, (y_rows, outputs) = buffer(b.pointer(frame, RESULT), 0, F32, 2)
    equal(number(b.pointer(frame, ATTRIBUTE_TYPES), 0), SCALAR)
    scalar = b.pointer(b.pointer(frame, ATTRIBUTE), 0)
    equal(number(scalar, 0), S64)
    group, groups, zero = b.read(b.pointer(scalar, 1), 0), b.word(1), ir.Constant(POINTER, None)
    equal(y_rows, rows)
    equal(code_outputs, outputs)
    equal(scale_dims[-1], outputs)
    _demand(b, b.icmp_signed("<=", rows, b.word(most_rows)), refuse)
    if kind == "int8":
        equal(code_rows, inputs)
    else:
        equal(code_rows, b.lshr(b.add(inputs, b.word(1)), b.word(1)))
        _demand(b, b.icmp_signed(">", group, b.word(0)), refuse)
        groups = b.sdiv(b.sub(b.add(inputs, group), b.word(1)), group)
        equal(scale_dims[0], groups)
        ((given, (zero_groups, zero_outputs)),) = others
        without = b.icmp_signed("==", b.or_(zero_groups, zero_outputs), b.word(0))
        same = b.and_(b.icmp_signed("==", zero_groups, groups), b.icmp_signed("==", zero_outputs, outputs))
        _demand(b, b.or_(without, same), refuse)
        zero = b.select(without, zero, given)
    return {X: x, W: codes, SCALE: scale, ZERO: zero, Y: y, R: rows, I: inputs, O: outputs, GROUP: group, G: groups}


def _call(b: _Code, function: Any, argument: Any) -> Any:
    """Calls a function of XLA's table, which takes one structure and returns an error or a null pointer."""
    declared = ir.FunctionType(POINTER, [POINTER])
    function.type = declared.as_pointer()
    return b.call(function, [argument])


def _share(b: _Code, record: Any, task: Any, api: Any, context: Any) -> None:
    """Writes how a record's parts are shared: some of XLA's threads are asked to help, then all parts are done."""
    null = ir.Constant(POINTER, None)
    inputs, outputs = b.read(record, I), b.read(record, O)
    count, asked = b.room(WORD), b.room(WORD, 5)
    b.store(b.word(1), count)
    b.write(b.word(32), asked, 0)
    b.write(b.word(0), asked, 1)
    b.store(context, b.at(asked, 2, WORD), align=8)
    b.store(count, b.at(asked, 3, WORD), align=8)
    forget = b.room(WORD, 3)

    def given(error: Any) -> Any:
        """Returns whether there was no error; XLA's errors are given back."""
        good = b.icmp_unsigned("==", error, null)
        with b.if_then(b.not_(good)):
            b.write(b.word(24), forget, 0)
            b.write(b.word(0), forget, 1)
            b.store(error, b.at(forget, 2, WORD), align=8)
            _call(b, b.pointer(api, DESTROY_ERROR), forget)
        return good

    known = given(_call(b, b.pointer(api, COUNT_THREADS), asked))
    threads = b.select(known, b.load(count, typ=WORD), b.word(1))
    # Parts are of whole vectors, two for each thread where these are worth it.
    fair = b.sdiv(b.add(outputs, b.sub(b.mul(threads, b.word(2)), b.word(1))), b.mul(threads, b.word(2)))
    worth = b.sdiv(b.word(NUMBERS), b.most(inputs, b.word(1)))
    columns = b.whole(b.add(b.most(fair, worth), b.word(LANES - 1)), LANES)
    columns = b.most(b.word(LANES), b.least(columns, b.word(STRIP)))
    parts = b.sdiv(b.sub(b.add(outputs, columns), b.word(1)), columns)
    helpers = b.sub(b.least(threads, parts), b.word(1))
    helpers = b.most(helpers, b.word(0))
    for place, value in ((NEXT, b.word(0)), (DONE, b.word(0)), (PARTS, parts), (COLUMNS, columns)):
        b.write(value, record, place)
    b.write(b.add(helpers, b.word(2)), record, USERS)  # this thread is one until it has seen that all is done
    b.write(b.word(40), asked, 0)
    b.store(task, b.at(asked, 3, WORD), align=8)
    b.store(record, b.at(asked, 4, WORD), align=8)
    with b.loop(b.word(0), helpers):
        sent = given(_call(b, b.pointer(api, SCHEDULE), asked))
        with b.if_then(b.not_(sent)):
            b.atomic_rmw("sub", b.at(record, USERS, WORD), b.word(1), "seq_cst")
    b.call(task, [record])
    wait, again, rest, over = (b.append_basic_block() for _ in range(4))
    entered = b.block
    b.branch(wait)
    b.position_at_end(wait)
    spins = b.phi(WORD)
    spins.add_incoming(b.word(0), entered)
    done = b.load_atomic(b.at(record, DONE, WORD), "acquire", 8, typ=WORD)
    b.cbranch(b.icmp_signed("<", done, parts), again, over)
    b.position_at_end(again)
    spins.add_incoming(b.add(spins, b.word(1)), again)
    spins.add_incoming(b.add(spins, b.word(1)), rest)
    b.cbranch(b.icmp_signed(">", spins, b.word(SPINS)), rest, wait)
    b.position_at_end(rest)
    b.call(_library(b.module, "sched_yield", INT), [])
    b.branch(wait)
    b.position_at_end(over)
    users = b.atomic_rmw("sub", b.at(record, USERS, WORD), b.word(1), "seq_cst")
    with b.if_then(b.icmp_signed("==", users, b.word(1))):
        b.call(_library(b.module, "free", NOTHING, POINTER), [record])
