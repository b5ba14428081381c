"""The rules of dependent launches (see ``kernels/_triton.py``), looked for in PTX and in machine code."""

from __future__ import annotations

import re
from collections.abc import Iterator

from graphopt.kernels._compile import Compiled

_WAIT = "griddepcontrol.wait"
_READS = re.compile(r"\b(ld\.(?!param|shared|local|const)\S*|cp\.async\.(?!wait|commit|mbarrier|bulk)\S*)")
_WRITES = re.compile(
    r"\b(st\.(?!shared|local|async|param)\S*|red\.(?!async)\S*|atom\.(?!shared)\S*|cp\.reduce\.\S*)"
)
_BULK = re.compile(r"\bcp\.async\.bulk\.(?!wait|commit|prefetch)\S*")
_BULK_STORE = re.compile(r"\bcp\.async\.bulk\.\S*global\.shared\S*")
_JUMP_TABLE = ".branchtargets"
_LABEL = re.compile(r"^(\$\w+):")
_END = re.compile(r"\b(ret|exit|trap);")
_BRANCH = re.compile(r"\bbra(?:\.uni)?\s+(\$\w+)")
_REGISTER = re.compile(r"%\w+")
_PARAMETER = re.compile(r"\b\w+_param_(\d+)")
_POINTER = re.compile(r"\.param \.u64 \.ptr \S+ .*?_param_(\d+)")
# In machine code: the wait, and what reads or writes global memory; of shared memory LDS and STS do.
_SASS_WAIT = "ACQBULK"
_SASS_READS = re.compile(r"\b(LDG|LD)\.")
_SASS_MOVES = re.compile(r"\b(STG|ST|ATOMG|ATOM|RED|REDG|LDGSTS|UTMALDG|UTMASTG|UTMAREDG|UBLKCP)\b")


def hazards(kernel: Compiled) -> list[str]:
    """Every place where a kernel breaks a rule, in words; its weights may be read early."""
    body = _instructions(kernel.ptx)
    waits = [place for place, line in enumerate(body) if _WAIT in line]
    if not waits:
        return ["the kernel never waits"]
    if any("setmaxnreg" in line for line in body):
        return [*_of_roles(kernel, body), *_open_stores(body), *_lost_waits(kernel.sass(), len(waits))]
    wait = waits[0]
    found = [*_ways_round(body, wait), *_early_accesses(kernel, body[:wait]), *_open_stores(body)]
    read = sum(1 for line in body[:wait] if _READS.search(line))
    return [*found, *_moved_by_ptxas(kernel.sass(), read)]


def _instructions(ptx: str) -> list[str]:
    """Lines of code and labels; no comments, no directives."""
    lines = (line.split("//")[0].strip() for line in ptx.split("{", 1)[1].splitlines())
    return [line for line in lines if line and (line[0] != "." or line.startswith(_JUMP_TABLE))]


def _of_roles(kernel: Compiled, body: list[str]) -> Iterator[str]:
    """What a kernel whose warps have roles does before a wait.

    Its warps part at the first branch: some go on, and wait before they end; the others are sent to a role
    each, and home when that is done. Until its own wait a role may only ask for weights, by TMA.
    """
    origins: dict[str, set[int]] = {}
    for line in body:
        _trace(line, origins)
    parting = next(place for place, line in enumerate(body) if _BRANCH.search(line))
    parted = [_before_a_wait(body, start) for start in _next(body, parting)]
    for place in sorted(set().union(*parted)):
        line = body[place]
        asks = _BULK.search(line) and not _BULK_STORE.search(line)
        if asks and _origins(line.split("[")[2].split(",")[0], origins) <= set(kernel.early):
            continue
        if _READS.search(line) or _WRITES.search(line) or _BULK.search(line):
            yield f"before the wait: {line}"
    if all(any(_END.search(body[place]) for place in reached) for reached in parted):
        yield "an end before the wait, whichever way the warps go"
    yield from (f"not every thread waits: {line}" for line in body if _WAIT in line and line.startswith("@"))


def _before_a_wait(body: list[str], start: int) -> set[int]:
    """The places that can be reached from one without a wait."""
    reached: set[int] = set()
    ways = [start]
    while ways:
        place = ways.pop()
        if place not in reached and place < len(body) and _WAIT not in body[place]:
            reached.add(place)
            ways += _next(body, place)
    return reached


def _next(body: list[str], place: int) -> list[int]:
    """Where a thread may be after an instruction."""
    line = body[place]
    labels = {match[1]: at for at, other in enumerate(body) if (match := _LABEL.match(other))}
    if "brx.idx" in line:
        table = next(at for at, other in enumerate(body) if _JUMP_TABLE in other)
        last = next(at for at in range(table + 1, len(body)) if body[at].endswith(";"))
        return [labels[name] for other in body[table + 1 : last + 1] for name in re.findall(r"\$\w+", other)]
    ahead = [] if re.match(r"(ret|exit|trap|bra(\.uni)?)\b", line) else [place + 1]
    return [*ahead, *(labels[jump[1]] for jump in [_BRANCH.search(line)] if jump)]


def _lost_waits(sass: str, waits: int) -> Iterator[str]:
    """That every role's wait is in the machine code."""
    found = sum(_SASS_WAIT in line for line in sass.splitlines())
    if found < waits:
        yield f"the machine code waits {found} times, PTX {waits} times"


def _ways_round(body: list[str], wait: int) -> Iterator[str]:
    """Ends and jumps that keep a thread from the wait, and loops around it."""
    labels = {match[1]: place for place, line in enumerate(body) if (match := _LABEL.match(line))}
    for place, line in enumerate(body):
        if place < wait and _END.search(line):
            yield f"an end before the wait: {line}"
        if jump := _BRANCH.search(line):
            target = labels[jump[1]]
            if place < wait < target:
                yield f"a way round the wait: {line}"
            elif target < wait < place:
                yield f"a loop around the wait: {line}"
    if body[wait].startswith("@"):
        yield f"not every thread waits: {body[wait]}"


def _early_accesses(kernel: Compiled, ahead: list[str]) -> Iterator[str]:
    """Reads of what is no weight, and writes, before the wait."""
    pointers = {int(number) for number in _POINTER.findall(kernel.ptx)}
    origins: dict[str, set[int]] = {}
    for line in ahead:
        if _WRITES.search(line) or _BULK.search(line):
            yield f"before the wait: {line}"
        if _READS.search(line):
            address = line[line.rindex("[") :]
            read = _origins(address, origins) & pointers
            if not read or not read <= set(kernel.early):
                yield f"reads parameters {sorted(read)} before the wait: {line}"
        _trace(line, origins)


def _trace(line: str, origins: dict[str, set[int]]) -> None:
    """Note from which parameters the registers that an instruction writes are computed."""
    _, _, operands = line.removeprefix("@").partition(" ")
    if line.startswith("@"):
        _, _, operands = operands.partition(" ")
    operands = operands.strip()
    made, _, rest = operands.partition("}" if operands.startswith("{") else ",")
    sources = {int(number) for number in _PARAMETER.findall(rest)} | _origins(rest, origins)
    for register in _REGISTER.findall(made):
        origins[register] = origins.get(register, set()) | sources


def _origins(text: str, origins: dict[str, set[int]]) -> set[int]:
    return set().union(*(origins.get(register, set()) for register in _REGISTER.findall(text)))


def _open_stores(body: list[str]) -> Iterator[str]:
    """Stores by TMA that nobody waits for: a program's shared memory is gone when it ends."""
    stores = [place for place, line in enumerate(body) if _BULK_STORE.search(line)]
    if stores and not any("cp.async.bulk.wait_group" in line for line in body[stores[-1] :]):
        yield f"no wait for {body[stores[-1]]}"


def _moved_by_ptxas(sass: str, read: int) -> Iterator[str]:
    """What machine code does before its wait that PTX did behind it."""
    lines = [line for line in sass.splitlines() if re.match(r"\s+/\*[0-9a-f]{4,}\*/", line)]
    waits = [place for place, line in enumerate(lines) if _SASS_WAIT in line]
    if not waits:
        yield "the machine code never waits"
        return
    ahead = lines[: waits[0]]
    yield from (f"machine code before the wait: {line.strip()}" for line in ahead if _SASS_MOVES.search(line))
    yield from (f"machine code ends early: {line.strip()}" for line in ahead if " EXIT" in line)
    loads = sum(1 for line in ahead if _SASS_READS.search(line))
    if loads > read:
        yield f"machine code reads {loads} times before the wait, PTX {read} times"
