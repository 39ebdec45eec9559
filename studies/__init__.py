"""Studies that a checkout can run anew; no part of the package, since they write into docs/."""
