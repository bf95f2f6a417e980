"""Figures of hvhost: ``python -m bench``. Ratios beside a peer or a limit of the same run."""
