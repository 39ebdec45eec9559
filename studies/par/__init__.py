"""What PAR is worth on the bundled model: the study part of docs/par.md, measured and written by `make study`."""
