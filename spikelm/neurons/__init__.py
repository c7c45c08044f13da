"""Neurons: what turns the float vector in front of a projection into spikes."""

from spikelm.neurons.neuron import Neuron, Probe, Spikes

__all__ = ["Neuron", "Probe", "Spikes"]
