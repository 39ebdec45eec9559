"""Keep maps: what became of every visual token, drawn on the images that it shows.

with prunekit.apply(model, "fastv.yaml", trace=True) as run:
    model.generate(**inputs)
figure = figure_of([Run(run.trace)], [image])
save(figure, "keep.png")
"""

from prunekit.trace.figure import Figure, Run, figure_of
from prunekit.trace.saving import KINDS, save
from prunekit.trace.thumbnail import save_thumbnails

__all__ = ["KINDS", "Figure", "Run", "figure_of", "save", "save_thumbnails"]
