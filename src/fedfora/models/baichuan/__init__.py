"""Baichuan and Baichuan2 for transformers, without the code that comes with their checkpoints.

Each module registers what it defines when it is imported; `fedfora` imports them when transformers'
Auto classes and PEFT are loaded.
"""
