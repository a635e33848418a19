"""Texts and questions to windows of tokens."""
