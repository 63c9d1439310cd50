"""A test that compiles, with what torch says of itself meanwhile."""

import pytest

# what torch says of itself while it compiles: Dynamo asks every input for its .grad and instantiates
# an autograd.Function to ask for its class, Inductor imports torch.jit
COMPILED = (
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
)


def compiled(test):
    for mark in COMPILED:
        test = mark(test)
    return test
