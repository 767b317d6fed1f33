"""The plots of `benches.serve`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

COLOURS = {
    "triptych gRPC": "#0b6e4f",
    "triptych gateway": "#6fc49f",
    "vLLM": "#d1603d",
    "vLLM, all cores": "#e9a68b",
    "Dynamo": "#8a8d91",
}
REFERENCE = "vLLM"


def serve(results: Mapping[Any, Any], curves: Mapping[str, Any], file: Path) -> None:
    """Bars of requests a second for each load, and curves of the first token under rising rates."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import ScalarFormatter

    figure, axes = plt.subplots(
        1, 1 + len(curves), figsize=(6 + 4 * len(curves), 4.5), squeeze=False
    )
    bars_of, *curves_of = axes[0]
    _bars(bars_of, results)
    for axis, (kind, lines) in zip(curves_of, curves.items(), strict=True):
        for name, points in lines.items():
            rates = [rate for rate, _ in points]
            colour = COLOURS.get(name)
            axis.plot(rates, [m.ttft * 1e3 for _, m in points], "o-", color=colour, label=name)
            axis.plot(rates, [m.ttft_p99 * 1e3 for _, m in points], "o:", color=colour)
        axis.set(title=f"{kind}, open loop", xlabel="requests sent a second", yscale="log")
        axis.set_ylabel("first token, ms: median, 99th percentile dotted")
        axis.yaxis.set_major_formatter(ScalarFormatter())
        axis.yaxis.set_minor_formatter(ScalarFormatter())
        axis.grid(alpha=0.3)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    bars, names = bars_of.get_legend_handles_labels()
    figure.legend(bars, names, frameon=False, loc="lower center", ncols=len(names))
    figure.savefig(file)
    plt.close(figure)


def _bars(axis: Any, results: Mapping[Any, Any]) -> None:
    names = [name for name in COLOURS if any(name in peers for peers in results.values())]
    height = 0.8 / len(names)
    labelled = set()
    for place, (_, peers) in enumerate(results.items()):
        reference = median(one.requests_per_s for one in peers[REFERENCE])
        for number, name in enumerate(names):
            if name not in peers:
                continue
            value = median(one.requests_per_s for one in peers[name]) / reference
            label = "" if name in labelled else name
            labelled.add(name)
            at = place + number * height
            axis.barh(at, value, height, color=COLOURS[name], label=label)
    axis.set_yticks(
        [place + 0.4 - height / 2 for place in range(len(results))],
        [f"{kind}, {streams}" for kind, streams in results],
    )
    axis.invert_yaxis()
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set(title="load, streams", xlabel="requests a second ÷ vLLM's server")
