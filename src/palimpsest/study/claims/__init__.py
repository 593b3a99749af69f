"""What published results claim, and whether it holds: the claims of replications and how they are judged."""

from palimpsest.study.claims.measuring import MEASUREMENTS, Setting, measurement

__all__ = ["MEASUREMENTS", "Setting", "measurement"]
