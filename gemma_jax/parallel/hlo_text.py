"""XLA's text of a program (HLO) as instructions, and how often each computation runs.

XLA's own `cost_analysis` counts the body of a loop once; here it counts as often as the loop turns.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) (?:\(.*)?\{$")
_INSTRUCTION = re.compile(r"(ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r" ?([\w\-]+)\(")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<= ]*)\]")
_KNOWN_TRIPS = re.compile(r"known_trip_count\W+n\W+(\d+)")
_COUNTER = re.compile(r"[su]\d+\[\]|pred\[\]|\(")
_COMMENT = re.compile(r"/\*.*?\*/")
# What runs another computation once, and the attribute that names it; libtpu's custom calls have work for SparseCores.
_CALLS = {"fusion": "calls", "call": "to_apply", "async-start": "calls", "custom-call": "called_computations"}
_BITS = {"pred": 8, "bf16": 16, "c64": 64, "c128": 128, "token": 0, "opaque": 0}


@dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    result: str  # its type, as "bf16[8,512]{1,0}" or a tuple of such
    argument: str  # what stands in the parentheses
    attributes: str  # what follows them
    is_root: bool

    @property
    def operands(self) -> tuple[str, ...]:
        """The names of the instructions it reads."""
        return tuple(part.split()[-1].lstrip("%") for part in split(self.argument) if part.strip())

    def called(self, key: str) -> tuple[str, ...]:
        """The computations an attribute names, as `calls` or `branch_computations`."""
        found = re.search(rf"(?:^|, ){key}=(\{{[^}}]*\}}|%?[\w.\-]+)", self.attributes)
        return tuple(name.strip().lstrip("%") for name in found[1].strip("{}").split(",")) if found else ()


Computation = Mapping[str, Instruction]


@dataclass(frozen=True)
class Program:
    """All computations by name; `num_devices` is None where the text does not tell."""

    computations: Mapping[str, Computation]
    entry: str
    num_devices: int | None


@dataclass(frozen=True)
class Executions:
    """How often a computation runs in one run of the program."""

    count: int | None  # None: in a loop of which the text does not tell the number of turns
    is_at_most: bool = False  # in a branch that need not be taken

    def times(self, count: int | None, *, is_at_most: bool = False) -> "Executions":
        """Those of a computation that each of these runs `count` times."""
        product = None if count is None or self.count is None else self.count * count
        return Executions(product, self.is_at_most or is_at_most)

    def plus(self, other: "Executions") -> "Executions":
        """Those of a computation run from two places."""
        total = None if other.count is None or self.count is None else self.count + other.count
        return Executions(total, self.is_at_most or other.is_at_most)


def split(text: str) -> list[str]:
    """Parts between the commas that no bracket encloses."""
    parts, depth, start = [], 0, 0
    for at, letter in enumerate(text):
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            parts.append(text[start:at])
            start = at + 1
    return [*parts, text[start:]] if text.strip() else []


def arrays(type_text: str) -> list[tuple[str, tuple[int, ...]]]:
    """Element type and shape of each array of a type."""
    found = _ARRAY.findall(type_text)
    return [(kind, tuple(int(size.strip(" <=")) for size in shape.split(",") if size)) for kind, shape in found]


def nbytes(type_text: str) -> int:
    """Bytes of all arrays of a type, unpadded."""
    return sum(math.ceil(math.prod(shape) * _bits(kind) / 8) for kind, shape in arrays(type_text))


def _bits(kind: str) -> int:
    if kind in _BITS:
        return _BITS[kind]
    found = re.match(r"[a-z](\d+)", kind)  # f8e4m3fn, s4, u32
    if found is None:
        raise ValueError(f"HLO element type {kind!r} is not known: cannot tell its size")
    return int(found[1])


def parse(text: str) -> Program:
    """The program of `compiled.as_text()`, `lowered.as_text(dialect="hlo")`, or a file that XLA wrote.

    Raises ValueError for text without an entry computation.
    """
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = None, None
    for line in text.splitlines():
        if current is None:
            header = None if line.startswith(("HloModule", " ")) else _HEADER.match(line.rstrip())
            if header is not None:
                current = computations.setdefault(header[2], {})
                entry = header[2] if header[1] else entry
        elif line.startswith("}"):
            current = None
        elif (instruction := _instruction(_COMMENT.sub("", line).strip())) is not None:
            current[instruction.name] = instruction
    if entry is None:
        raise ValueError(f"no ENTRY computation in {len(text)} characters; wanted the HLO text of a program")
    count = re.search(r"\bnum_partitions=(\d+)", text[: text.find("\n")])
    return Program(computations, entry, int(count[1]) if count else None)


def _instruction(line: str) -> Instruction | None:
    head = _INSTRUCTION.match(line)
    if head is None:
        return None
    after_type = _closing(line, head.end()) if line[head.end()] == "(" else line.find(" ", head.end())
    opcode = _OPCODE.match(line, after_type)
    if opcode is None:
        return None
    end = _closing(line, opcode.end() - 1)
    argument, attributes = line[opcode.end() : end - 1], line[end:].removeprefix(", ")
    return Instruction(head[2], opcode[1], line[head.end() : after_type], argument, attributes, bool(head[1]))


def _closing(line: str, start: int) -> int:
    """The place after the parenthesis that closes the one at `start`."""
    depth = 0
    for bracket in re.finditer(r"[()]", line[start:]):
        depth += 1 if bracket[0] == "(" else -1
        if depth == 0:
            return start + bracket.end()
    return len(line)


def executions(program: Program) -> dict[str, Executions]:
    """How often each computation runs that the entry reaches; those of reductions and sorts are not followed."""
    found = {program.entry: Executions(1)}
    for name in _callers_first(program):
        for instruction in program.computations[name].values():
            for callee, count, is_branch in _calls(program, program.computations[name], instruction):
                runs = found[name].times(count, is_at_most=is_branch)
                found[callee] = found[callee].plus(runs) if callee in found else runs
    return found


def _callers_first(program: Program) -> list[str]:
    order: list[str] = []
    seen: set[str] = set()

    def visit(name: str) -> None:
        seen.add(name)
        computation = program.computations[name]
        for instruction in computation.values():
            for callee, *_ in _calls(program, computation, instruction):
                if callee not in seen:
                    visit(callee)
        order.append(name)

    visit(program.entry)
    return order[::-1]


def _calls(
    program: Program, computation: Computation, instruction: Instruction
) -> Iterator[tuple[str, int | None, bool]]:
    """What an instruction runs, how often, and whether that is a branch it may not take."""
    if instruction.opcode == "while":
        trips = trip_count(program, computation, instruction)
        for callee in instruction.called("body"):
            yield callee, trips, False
        for callee in instruction.called("condition"):
            yield callee, None if trips is None else trips + 1, False
    elif instruction.opcode == "conditional":
        for key in ("branch_computations", "true_computation", "false_computation"):
            for callee in instruction.called(key):
                yield callee, 1, True
    elif instruction.opcode in _CALLS:
        for callee in instruction.called(_CALLS[instruction.opcode]):
            yield callee, 1, False


def trip_count(program: Program, computation: Computation, loop: Instruction) -> int | None:
    """Turns of a `while`: as XLA noted them, or from start, step and limit of its counter; None where neither tells."""
    known = _KNOWN_TRIPS.search(loop.attributes)
    if known is not None:
        return int(known[1])
    compared = _root(program, loop.called("condition")[0], (_CARRY,))
    if not isinstance(compared, _Compared):
        return None
    start_of = computation.get(loop.operands[0])
    starts = start_of.operands if start_of is not None and start_of.opcode == "tuple" else ()
    following = _root(program, loop.called("body")[0], (_CARRY,))

    def start(index: int) -> "_Value":
        return _value(program, computation, starts[index], ()) if index < len(starts) else None

    def step(index: int) -> int | None:
        after = following[index] if isinstance(following, tuple) and index < len(following) else None
        return after.offset if isinstance(after, _Carried) and after.index == index else None

    def progression(side: _Value) -> tuple[int, int] | None:
        if isinstance(side, _Carried):
            first, each = start(side.index), step(side.index)
            return (first + side.offset, each) if isinstance(first, int) and each is not None else None
        return (side, 0) if isinstance(side, int) else None

    left, right = progression(compared.left), progression(compared.right)
    return None if left is None or right is None else _turns(left, right, compared.direction)


def _turns(left: tuple[int, int], right: tuple[int, int], direction: str) -> int | None:
    """How often `left direction right` holds before it first fails; each side is (start, step)."""
    gap, closing = right[0] - left[0], left[1] - right[1]
    if direction in ("GT", "GE"):
        gap, closing = -gap, -closing
    if direction in ("LE", "GE"):
        gap += 1
    if direction == "NE":
        return gap // closing if closing and gap % closing == 0 and gap // closing >= 0 else None
    if direction not in ("LT", "LE", "GT", "GE"):
        return None
    if gap <= 0:
        return 0
    return math.ceil(gap / closing) if closing > 0 else None


@dataclass(frozen=True)
class _Carried:
    """What a loop carries at `index`, plus a constant."""

    index: int
    offset: int = 0


@dataclass(frozen=True)
class _Compared:
    left: "_Value"
    right: "_Value"
    direction: str


_CARRY = "carry"  # all that a loop carries
_Value = int | str | _Carried | _Compared | tuple | None  # None: not one of these


def _root(program: Program, name: str, arguments: tuple[_Value, ...]) -> _Value:
    """The value a computation returns."""
    computation = program.computations[name]
    root = next(instruction for instruction in computation.values() if instruction.is_root)
    return _value(program, computation, root.name, arguments)


def _value(program: Program, computation: Computation, name: str, arguments: tuple[_Value, ...]) -> _Value:
    """The value of an instruction as far as loop counters go: integers, comparisons and tuples of them."""
    instruction = computation.get(name)
    if instruction is None or not _COUNTER.match(instruction.result):
        return None

    def operand(index: int) -> _Value:
        return _value(program, computation, instruction.operands[index], arguments)

    match instruction.opcode:
        case "constant":
            return int(instruction.argument) if re.fullmatch(r"-?\d+", instruction.argument) else None
        case "parameter":
            number = int(instruction.argument)
            return arguments[number] if number < len(arguments) else None
        case "get-tuple-element":
            index, of = int(re.findall(r"index=(\d+)", instruction.attributes)[0]), operand(0)
            if of == _CARRY:
                return _Carried(index)
            return of[index] if isinstance(of, tuple) else None
        case "copy" | "copy-start" | "copy-done" | "bitcast" | "convert" | "reshape" | "optimization-barrier":
            return operand(0)
        case "tuple":
            return tuple(operand(index) for index in range(len(instruction.operands)))
        case "add" | "subtract":
            return _sum(operand(0), operand(1), -1 if instruction.opcode == "subtract" else 1)
        case "compare":
            direction = re.findall(r"direction=(\w+)", instruction.attributes)[0]
            return _Compared(operand(0), operand(1), direction)
        case "fusion" | "call":
            inner = tuple(operand(index) for index in range(len(instruction.operands)))
            return _root(program, instruction.called(_CALLS[instruction.opcode])[0], inner)
        case _:
            return None


def _sum(left: _Value, right: _Value, sign: int) -> _Value:
    if isinstance(left, int) and isinstance(right, _Carried) and sign == 1:
        left, right = right, left
    if not isinstance(right, int):
        return None
    if isinstance(left, _Carried):
        return _Carried(left.index, left.offset + sign * right)
    return left + sign * right if isinstance(left, int) else None
