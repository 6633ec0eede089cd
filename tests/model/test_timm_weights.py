"""Names of weights in timm and here, both ways."""

import pytest
import timm
import torch

from rsengine.model import from_timm, resnet_rs, to_timm


@pytest.mark.parametrize("depth", [50, 101])
def test_to_timm_gives_every_tensor_of_timms_network(depth):
    with torch.device("meta"):
        ours, theirs = resnet_rs(depth, 10), timm.create_model(f"resnetrs{depth}", num_classes=10)
    renamed, state = to_timm(ours.state_dict()), theirs.state_dict()
    assert {name: t.shape for name, t in renamed.items()} == {name: t.shape for name, t in state.items()}


def test_there_and_back_is_the_same():
    state = resnet_rs(blocks=[1, 2], num_classes=3, width_multiplier=0.25, stem_width=8).state_dict()
    back = from_timm(to_timm(state))
    assert list(back) == list(state) and all(torch.equal(back[name], state[name]) for name in state)
