import os
import subprocess
import sys

import pytest

from actzip import cpu
from actzip.errors import InputError


def test_best_is_last_and_in_use_by_default():
    assert cpu.isas()[0] == "baseline"
    assert cpu.isa() in cpu.isas()


def test_every_set_can_be_forced_and_released():
    for name in cpu.isas():
        with cpu.forced(name):
            assert cpu.isa() == name
    assert cpu.info()["isa"] == cpu.isa()


def test_unknown_set_is_refused_and_changes_nothing():
    before = cpu.isa()
    with pytest.raises(InputError, match="mmx"):
        cpu.force("mmx")
    assert cpu.isa() == before


@pytest.mark.parametrize("name", ["baseline", "nonsense"])
def test_environment_variable(name):
    code = "from actzip import cpu; i = cpu.info(); print(i['isa'], '|', i['isa_warning'])"
    env = {**os.environ, "ACTZIP_ISA": name}
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    isa, warning = out.stdout.strip().split(" |")
    if name == "baseline":
        assert isa == "baseline" and not warning.strip()
    else:
        assert isa == cpu.isas()[-1] and "nonsense" in warning
