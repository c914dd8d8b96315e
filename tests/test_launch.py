"""What `launch/test.sh` sets is what JAX reads: of a misspelt name JAX says nothing."""

import re
from pathlib import Path

import jax


def test_the_cache_of_the_tests_is_set_by_names_that_jax_knows():
    script = Path(__file__).parents[1] / "launch/test.sh"
    named = re.findall(r"^export (JAX_[A-Z_]+)=", script.read_text(), re.MULTILINE)
    assert len(named) == 3
    assert not {n for n in named if n.lower() not in jax.config.values}
