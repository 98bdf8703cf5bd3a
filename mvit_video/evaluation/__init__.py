"""Scores of labelled videos, and the figures and reports made of them."""
