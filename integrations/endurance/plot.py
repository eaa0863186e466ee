"""The picture of a long run: memory, pages and open files over time."""

from collections.abc import Sequence
from pathlib import Path

from endurance.samples import PAGE_OWNERS, Sample


def plot(samples: Sequence[Sample], path: Path, *, title: str, warm_up_s: float) -> None:
    """Write a PNG. Needs matplotlib (the extra `plot`)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    minutes = [sample.at_s / 60 for sample in samples]
    figure, (memory, pages, files) = plt.subplots(3, 1, figsize=(9, 9), sharex=True, layout="constrained")
    for which in ("api", "engine"):
        memory.plot(minutes, [getattr(sample, which).rss_mib for sample in samples], label=f"{which} process")
        files.plot(minutes, [getattr(sample, which).num_files for sample in samples], label=f"{which}: open files")
        files.plot(minutes, [getattr(sample, which).num_threads for sample in samples], "--", label=f"{which}: threads")
    memory.set(ylabel="resident memory, MiB", ylim=(0, None), title=title)
    series = [[sample.pages[owner] for sample in samples] for owner in reversed(PAGE_OWNERS)]
    pages.stackplot(minutes, series, labels=list(reversed(PAGE_OWNERS)))
    pages.set(ylabel="pages of the device")
    files.set(ylabel="open files, threads", ylim=(0, None), xlabel="minutes")
    for axes in (memory, pages, files):
        axes.axvline(warm_up_s / 60, color="grey", linewidth=0.8, linestyle=":")
        axes.legend(loc="center right", fontsize="small")
    figure.savefig(path, dpi=110)
    plt.close(figure)
