"""Exported programs, and packages that need torch alone."""
