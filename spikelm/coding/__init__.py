"""Spike codes: integer counts <-> trains of spikes over S steps."""

from spikelm.coding.codes import CODES, Code
from spikelm.coding.train import Statistics, Train, event_matmul, statistics

__all__ = ["CODES", "Code", "Statistics", "Train", "event_matmul", "statistics"]
