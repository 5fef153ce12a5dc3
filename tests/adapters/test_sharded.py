"""Models whose parameters are in shards."""

import pytest
import torch
from torch import nn

from metalora.adapters import LoRAConfig, adapt, merge_and_unload, unload
from metalora.nn import tasks
from tests.processes import needs_gloo, run_processes

pytestmark = needs_gloo
IDS = torch.tensor([0, 1, 2])


def network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
    adapt(model, LoRAConfig(rank=2, heads=["2"]), 3)
    nn.init.normal_(model[0].lora_B)
    return model


def refuse_and_go_on():
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import fully_shard

    model, x = network(), torch.ones(3, 4)
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    with tasks(IDS):
        want = model(x)
    for undo in (unload, lambda m: merge_and_unload(m, 1)):
        with pytest.raises(ValueError, match="unload: the model must not be sharded"):
            undo(model)
    with tasks(IDS):
        assert torch.equal(model(x), want)
    whole = network()
    whole.load_state_dict(get_model_state_dict(model, options=StateDictOptions(True)))
    torch.testing.assert_close(merge_and_unload(whole, 1)(x)[1], want[1])


@pytest.mark.slow
def test_removing_from_a_sharded_model_is_refused_and_leaves_it_as_it_was():
    run_processes(refuse_and_go_on, 2)
