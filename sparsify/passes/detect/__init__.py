"""Detection of coupled structures by axis unification."""
