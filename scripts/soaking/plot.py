"""The curves of a soak."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from soaking.sample import Sample
from soaking.verdict import SETTLED

PANELS: tuple[tuple[str, str, Callable[[str], bool]], ...] = (
    ("memory of a process that is no file's", "MiB", lambda name: name.startswith("memory")),
    ("the same, since the first third", "MiB more", lambda name: name.startswith("memory")),
    ("RSS and PSS, libraries included", "MiB", lambda name: name[1:3] == "SS"),
    ("open", "count", lambda name: name in ("descriptors", "threads", "processes")),
    ("/dev/shm and temporary files", "MiB, files", lambda name: "files" in name or "shm" in name),
    (
        "held at rest",
        "count",
        lambda name: any(word in name for word in ("hand", "leases", "requests", "slots")),
    ),
)
SINCE = 1
"""The panel whose curves begin at 0."""


def draw(title: str, asked: Sequence[int], samples: Sequence[Sample], folder: Path) -> list[Path]:
    """Write ``soak.png`` and ``soak.svg``.

    Args:
        title: Over it all.
        asked: Requests and aborts before each sample.
        samples: As many.
        folder: Where to.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        len(PANELS), 1, figsize=(10, 3 * len(PANELS)), sharex=True, layout="constrained"
    )
    settled = int(len(samples) * SETTLED)
    colours: dict[str, str] = {}
    for place, (axis, (name, unit, wanted)) in enumerate(zip(axes, PANELS, strict=True)):
        for series in filter(wanted, samples[-1]):
            values = [sample.get(series, 0.0) for sample in samples]
            base = values[settled] if place == SINCE else 0.0
            # A role has the same colour everywhere.
            role = series.rpartition(" of ")[2]
            axis.plot(
                asked,
                [value - base for value in values],
                "--" if series.startswith("PSS") else "-",
                marker=".",
                color=colours.setdefault(role, f"C{len(colours) % 10}"),
                label=series.removeprefix("memory of "),
            )
        axis.axvspan(asked[0], asked[settled], color="0.94", zorder=0)
        axis.set(title=name, ylabel=unit)
        axis.grid(alpha=0.3)
        axis.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    axes[-1].set(xlabel="requests and aborts", ylim=(-0.5, max(1.0, axes[-1].get_ylim()[1])))
    figure.suptitle(title)
    files = [folder / f"soak.{form}" for form in ("png", "svg")]
    for file in files:
        figure.savefig(file)
    plt.close(figure)
    return files
