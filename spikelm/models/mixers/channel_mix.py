"""`channel_mix` in the place of a mixer: SpikeGPT's `RWKV-ffnPre`."""

from __future__ import annotations

from spikelm.models.ffn import ChannelMix
from spikelm.models.layers import MixerTable

MIXERS: MixerTable = {"channel_mix": ChannelMix}
