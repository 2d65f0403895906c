"""Batched transducer search. It knows a decoder by `scorer.py` alone; torch only."""
