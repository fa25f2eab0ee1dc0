"""What `dic-repa train --dry-run` prints."""

import json

GIB = 2**30
GPU_SIZES = (16, 24, 40, 48, 80, 96, 141)  # GiB
MARGIN = 1.2  # of an estimate: workspaces, fragmentation, gradients of activations


def dry_run_text(report: dict) -> str:
    """The report of `dic_repa.training.dry_run` as lines."""
    batch, p = report["batch"], report["parameters"]
    frozen = "".join(f"; frozen: {name} {count / 1e6:.1f} M" for name, count in p["encoders"].items())
    rows = [
        ("device", f"{report['device']}; {report['processes']} process{'es' * (report['processes'] > 1)}"),
        ("batch", f"{batch['global']}, {batch['of a process']} a process, {batch['of a pass']} a pass"),
        ("parameters", f"denoiser {p['denoiser'] / 1e6:.2f} M, heads {p['heads'] / 1e6:.2f} M{frozen}"),
        ("MACs", f"{report['gmacs']:.4g} G for an image, forward, denoiser"),
        ("memory", _memory(report)),
    ]
    if "steps_per_second" in report:
        speed = f"{report['steps_per_second']:.3g} steps/s, {report['images_per_second']:.4g} images/s "
        rows.append(("speed", f"{speed}(the first step took {report['first_step_seconds']:.1f} s){_scaling(report)}"))
        energy = report["kwh_to_the_end"]
        spent = f"{energy:.4g} kWh at {report['watts']:.0f} W a GPU" if energy else "energy not measured"
        rows.append(("to the end", f"{_duration(report['hours_to_the_end'])}, {spent}"))
    else:
        rows.append(("speed", "not measured"))
    disk = report["disk"]
    snapshots = f" and {disk['snapshots']} snapshots" if disk["snapshots"] else ""
    enough = f"{_gib(disk['total'])} of {_gib(disk['free'])} free{' - TOO LITTLE' * (disk['total'] > disk['free'])}"
    rows.append(("disk", f"{_gib(disk['checkpoint'])} a checkpoint; {disk['kept']} at once{snapshots}: {enough}"))
    rows += _paper(report["paper"])
    rows += [("note", note) for note in report["notes"]]
    return "\n".join(f"{name:12}{text}" for name, text in rows)


def _memory(report: dict) -> str:
    if memory := report.get("memory"):
        return f"peak {_gib(memory['peak'])} of {_gib(memory['total'])}, headroom {_gib(memory['headroom'])} (measured)"
    estimate = report["memory_estimate"]
    total = sum(estimate.values())
    parts = ", ".join(f"{name} {_gib(count)}" for name, count in estimate.items() if count)
    size = next((size for size in GPU_SIZES if MARGIN * total <= size * GIB), None)
    fits = f"a GPU of {size} GiB should do" if size else "more than one GPU has: lower train.micro_batch"
    return f"about {_gib(total)} of a GPU, an ESTIMATE from shapes ({parts}); {fits}"


def _scaling(report: dict) -> str:
    if report["processes"] == report["launched"]:
        return ""
    return f"; one process measured, {report['processes']} assumed as fast, their exchange not counted"


def _paper(paper: dict | None) -> list[tuple[str, str]]:
    if paper is None:
        return [("paper", "no row of a paper")]
    results = _results(paper["results"])
    if not results and paper["elsewhere"]:
        others = ", ".join(f"{_results(values)} of {network}" for network, values in paper["elsewhere"].items())
        results = f"no published number of this network, {others}"
    rows = [("paper", paper["row"] + (f": {results}" if results else ""))]
    if paper["differs"]:
        rows.append(("", paper["differs"]))
    if paper["recipe"] is None:
        return [*rows, ("", "no recipe of that row comes with the package, so nothing to compare with")]
    changed = [
        f"{key}: {json.dumps(mine)} instead of {json.dumps(theirs)}" for key, (theirs, mine) in paper["changed"].items()
    ]
    return rows + [("", line) for line in changed or [f"all keys as in the recipe {paper['recipe']}"]]


def _results(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in values.items())


def _gib(count: float) -> str:
    return f"{count / GIB:.1f} GiB" if count >= 0.1 * GIB else f"{count / 2**20:.1f} MiB"


def _duration(hours: float) -> str:
    if hours < 1:
        return f"{60 * hours:.1f} minutes"
    return f"{hours:.1f} hours" if hours < 48 else f"{hours / 24:.1f} days"
