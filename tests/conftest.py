import os
import sys

import pytest

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(HERE), HERE]
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach for a network


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """tiny("llama") -> the folder of a tiny random checkpoint of that kind, made once a session."""
    import tiny as maker
    made = {}

    def folder(kind):
        if kind not in made:
            made[kind] = maker.tiny_model_folder(kind, tmp_path_factory.mktemp(kind))
        return made[kind]
    return folder


@pytest.fixture(scope="session")
def loaded(tiny):
    """loaded("llama") -> (model, chat), shared: tests leave its weights alone."""
    import torch
    import exgrpo
    made = {}

    def load(kind):
        if kind not in made:
            made[kind] = exgrpo.load_model(tiny(kind), torch.device("cpu"))
        return made[kind]
    return load
