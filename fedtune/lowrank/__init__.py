"""Algebra of low-rank updates: averages, stacks and residuals of s B A."""
