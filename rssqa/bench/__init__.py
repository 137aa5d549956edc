"""Protocols, results and speed: every published number is computed here."""
