"""Checks, golden files, records and stubs: what keeps every row honest, ours and yours."""
