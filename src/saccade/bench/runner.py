"""Running cases: every contestant is tried on its own, what can't run says why, and nothing that ran is lost."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from saccade.bench import ceilings, peers, result
from saccade.bench.case import Case, Check, Contestant, Field, Run, Settings, Skip
from saccade.bench.growth import growth
from saccade.bench.timing import Times, once, take_turns, wait

Save = Callable[[dict[str, Any]], None]
Rows = dict[tuple[str, str], dict[str, Any]]  # of contestants that several cases share, by what they work on and their name


class DeviceLost(Exception):
    """The GPU answers nothing any more: an illegal access ends its context for the whole process."""


@dataclass
class _Entry:
    """A contestant on its way through a case."""

    contestant: Contestant
    run: Run | None = None
    once_ms: float = 0.0
    fields: dict[str, Any] = field(default_factory=dict)
    status: str = "ok"
    notes: list[str] = field(default_factory=list)


def run_cases(
    op: str, grid: str, cases: Sequence[Case], settings: Settings, *, command: str = "", save: Save | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Measure the cases and return the result (see `saccade.bench.result`). save: called after each case with the result so far."""
    begin = time.monotonic()
    deadline = begin + settings.limit_s
    document = result.new(op, grid, settings, command)
    document["libraries"] = peers.installed()
    document["ceilings"] = ceilings.measure(settings)
    _release(settings)
    lost, known = "", Rows()
    for index, case in enumerate(cases):
        if progress is not None:
            progress(index, len(cases), case.label)
        if lost:
            rows = [_whole_case(op, case, "skipped", f"the GPU stopped answering in {lost}")]
        elif time.monotonic() > deadline:
            rows = [_whole_case(op, case, "skipped", f"the {settings.limit_s:.0f} s of this grid are over")]
        else:
            try:
                rows = _run_case(op, case, settings, deadline, known)
            except DeviceLost as error:
                lost = case.label
                rows = [_whole_case(op, case, "failed", str(error))]
        document["rows"] += rows
        document["growth"] = growth(document["rows"])
        document["seconds"] = round(time.monotonic() - begin, 1)
        document["complete"] = index == len(cases) - 1
        if save is not None:
            save(document)
    if progress is not None:
        progress(len(cases), len(cases), "")
    return document


def _run_case(op: str, case: Case, s: Settings, deadline: float, known: Rows) -> list[dict[str, Any]]:
    free = free_bytes(s)
    if free is not None and case.need > free:
        return [_whole_case(op, case, "skipped", f"it needs about {case.need / 1e9:.1f} GB and {free / 1e9:.1f} GB are free")]
    try:
        return _contest(op, case, s, deadline, known)
    finally:
        _release(s)  # the tensors are gone by now


def _contest(op: str, case: Case, s: Settings, deadline: float, known: Rows) -> list[dict[str, Any]]:
    with torch.set_grad_enabled(case.grad):
        try:
            place = case.build(s)
        except Exception as error:
            status, why = _reason(error, s)
            return [_whole_case(op, case, status, why)]
        again = [known[key] for c in place.contestants if (key := (c.shared or "", c.name)) in known]
        entries = [_first(c, place.check, s, deadline) for c in place.contestants if (c.shared or "", c.name) not in known]
        alive = {e.contestant.name: e for e in entries if e.run is not None and e.status == "ok"}
        calls: dict[str, Callable[[], object]] = {name: e.run.call for name, e in alive.items() if e.run is not None}
        estimates = {name: e.once_ms for name, e in alive.items()}
        for name, e in alive.items():
            if e.contestant.select is None:
                continue
            try:
                estimates[_selecting(name)] = once(e.contestant.select, s.device)[0]
                calls[_selecting(name)] = e.contestant.select
            except Exception as error:  # a method whose choice differs from call to call can't be timed in parts
                e.status, why = _reason(error, s)
                e.notes.append(f"choosing: {why}")
                calls.pop(name)
        ahead = {name: e.contestant.ahead_ms for name, e in alive.items()}
        times, failed = take_turns(calls, device=s.device, budget_ms=s.budget_ms, once_ms=estimates, ahead_ms=ahead)
    for name, error in failed.items():
        entry = alive[name.removesuffix(_selecting(""))]
        entry.status, why = _reason(error, s)
        entry.notes.append(why)
    rows = [_row(op, case, place, entry, times) for entry in entries]
    for entry, row in zip(entries, rows, strict=True):
        if entry.contestant.shared is not None and row["status"] == "ok":
            known[entry.contestant.shared, entry.contestant.name] = row
    rows += [{**row, "family": case.family, "case": dict(case.shape), "note": "timed once in this run"} for row in again]
    _ratios(rows)
    return rows


def _first(contestant: Contestant, check: Check | None, s: Settings, deadline: float) -> _Entry:
    """Prepare, call once (which compiles), judge the outputs, and call again for an estimate and the memory."""
    entry = _Entry(contestant)
    try:
        if time.monotonic() > deadline:
            raise Skip(f"the {s.limit_s:.0f} s of this grid are over")
        begin = time.perf_counter()
        run = contestant.make()
        raw = run.call()
        wait(s.device)
        entry.fields["first_call_ms"] = (time.perf_counter() - begin) * 1000
        entry.fields["impl"] = run.impl if isinstance(run.impl, str) else run.impl()
        entry.notes += [run.note] if run.note else []
        if check is not None and contestant.checked:
            with torch.no_grad():
                error, allowed = check.judge(run.outputs(raw))
            entry.fields |= {"error": error, "allowed": allowed, "ok": error <= allowed}
        del raw
        if s.cuda:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            once(run.call, s.device)
            entry.fields["peak_bytes"] = torch.cuda.max_memory_allocated() - before
        entry.once_ms = once(run.call, s.device)[0]
        entry.run = run
    except Exception as error:
        entry.status, why = _reason(error, s)
        entry.notes.append(why)
    return entry


def _selecting(name: str) -> str:
    return f"{name}, choosing"


def _row(op: str, case: Case, place: Field, entry: _Entry, times: dict[str, Times]) -> dict[str, Any]:
    c = entry.contestant
    notes = [place.note if c.role == "ours" else "", *entry.notes]
    fields: dict[str, Any] = {
        "op": op, "family": case.family, "case": dict(case.shape), "contestant": c.name, "role": c.role, "status": entry.status,
        "note": "; ".join(filter(None, notes)), "flops": c.work.flops, "bytes": c.work.bytes, "work": c.work.amount, "unit": c.work.unit,
        "rate_unit": "TFLOP/s" if c.work.unit == "FLOP" else "TB/s", "intensity": c.work.intensity,
        "density": place.density if c.role == "ours" or c.checked else (1.0 if place.density is not None else None), **entry.fields,
    }  # fmt: skip
    found = times.get(c.name)
    if entry.status == "ok" and found is not None:
        fields |= {
            "ms": found.median, "ms_low": found.low, "ms_high": found.high, "repeats": found.repeats,
            "rate": c.work.amount / found.median / 1e9, "tflops": c.work.flops / found.median / 1e9 if c.work.flops else None,
        }  # fmt: skip
        chosen = times.get(_selecting(c.name))
        fields["selection_ms"] = None if chosen is None else chosen.median
    return result.row(**fields)


def _ratios(rows: list[dict[str, Any]]) -> None:
    """Speed against the fastest dense contestant, and against the fastest peer that does the same work."""
    for role, key in (("dense", "ratio"), ("peer", "ratio_peer")):
        best = min((row["ms"] for row in rows if row["role"] == role and row["ms"]), default=None)
        for row in rows:
            if best is not None and row["ms"]:
                row[key] = best / (row["ms"] + (row["selection_ms"] or 0.0))


def _whole_case(op: str, case: Case, status: str, note: str) -> dict[str, Any]:
    return result.row(op=op, family=case.family, case=dict(case.shape), contestant="saccade", role="ours", status=status, note=note)


def _reason(error: Exception, s: Settings) -> tuple[str, str]:
    """("skipped" or "failed", one line). Raises DeviceLost where the GPU is gone with it."""
    if isinstance(error, Skip):
        return "skipped", str(error)
    if isinstance(error, torch.OutOfMemoryError):
        _release(s)
        return "skipped", "out of memory"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # a compiler shows the code first and says what is wrong with it at the end
    told = (lines or ["it gave no reason"])[-1 if "Compil" in type(error).__name__ else 0][:300]
    # ValueErrors of this library are sentences already
    told = told if isinstance(error, ValueError) else f"{type(error).__name__}: {told}"
    if s.cuda:
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            raise DeviceLost(told) from error
    # a kernel that torch doesn't have for this shape or this GPU is absent, not broken
    absent = any(words in str(error) for words in ("No available kernel", "No viable backend", "not supported", "can't run"))
    return "skipped" if absent else "failed", told


def free_bytes(s: Settings) -> float | None:
    """Memory that a case may take, 8 % left alone; None where the system doesn't say."""
    if s.cuda:
        return 0.92 * torch.cuda.mem_get_info()[0]
    try:
        return 0.92 * os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None


def _release(s: Settings) -> None:
    gc.collect()
    if s.cuda:
        try:
            torch.cuda.empty_cache()
        except RuntimeError:  # a lost GPU: there is nothing left to give back
            return


def bad_rows(document: dict[str, Any]) -> list[dict[str, Any]]:
    """saccade's own rows whose error is more than allowed, or which failed."""
    return [row for row in document["rows"] if row["role"] == "ours" and (row["ok"] is False or row["status"] == "failed")]
