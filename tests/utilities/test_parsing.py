"""Arguments of `__init__`, and attributes of the module, its hyper-parameters and the data module."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest

import lightlite as pl
from lightlite.hparams import AttributeDict as TheSame
from lightlite.utilities.parsing import (
    AttributeDict,
    clean_namespace,
    collect_init_args,
    get_init_args,
    is_picklable,
    lightning_getattr,
    lightning_hasattr,
    lightning_setattr,
    parse_class_init_keys,
    save_hyperparameters,
)


def test_keys_of_an_attribute_dict_are_attributes() -> None:
    settings = AttributeDict({"rate": 1, "longer": "x"})
    settings.rate = 2
    settings.update(more=[])
    del settings.longer
    assert (settings, settings.more) == ({"rate": 2, "more": []}, [])
    assert repr(settings) == '"more": []\n"rate": 2'
    with pytest.raises(AttributeError, match="there is no 'longer' in this AttributeDict; there are: rate, more"):
        _ = settings.longer
    with pytest.raises(KeyError, match="there is no 'longer' to delete"):
        del settings.longer
    assert TheSame is AttributeDict


def test_what_cannot_be_pickled_is_taken_out_and_named() -> None:
    settings = {"rate": 1, "function": lambda: 0}
    assert [is_picklable(value) for value in settings.values()] == [True, False]
    with pytest.warns(UserWarning, match=r"'function' cannot be pickled and is left out; .*ignore=\['function'\]"):
        clean_namespace(settings)
    assert settings == {"rate": 1}


class Base:
    def __init__(self, width: int, *rest: Any, **more: Any) -> None:
        frame = inspect.currentframe()
        assert frame is not None
        self.own = get_init_args(frame)
        self.all = collect_init_args(frame, [])
        self.of_others = collect_init_args(frame, [], classes=(str,))


class Derived(Base):
    def __init__(self, depth: int, *, name: str = "n") -> None:
        super().__init__(depth + 1, 7, extra=name)


def test_the_arguments_of_init_are_collected_from_the_base_to_the_derived_class() -> None:
    made = Derived(2)
    assert made.own == {"width": 3, "extra": "n"}
    assert made.all == [{"width": 3, "extra": "n"}, {"depth": 2, "name": "n"}]
    assert made.of_others == []
    frame = inspect.currentframe()
    assert frame is not None
    assert get_init_args(frame) == {}


def test_the_words_for_self_and_for_further_arguments_are_told() -> None:
    assert parse_class_init_keys(Base) == ("self", "rest", "more")
    assert parse_class_init_keys(Derived) == ("self", None, None)


def test_hyperparameters_can_be_kept_by_a_function() -> None:
    class Kept(pl.LightningModule):
        def __init__(self, width: int, depth: int = 2) -> None:
            super().__init__()
            save_hyperparameters(self, ignore="depth")

    assert Kept(3).hparams == {"width": 3}


def module_with_data() -> tuple[Any, Any]:
    module = pl.LightningModule()
    data = SimpleNamespace(hparams={"size": 3}, rate=2)
    module.__dict__["_trainer"] = SimpleNamespace(datamodule=data)
    module.rate = 1
    module.save_hyperparameters({"rate": 5})
    return module, data


def test_an_attribute_is_found_in_module_hparams_and_data_module() -> None:
    module, data = module_with_data()
    assert [lightning_hasattr(module, name) for name in ("rate", "size", "depth")] == [True, True, False]
    assert [lightning_getattr(module, name) for name in ("rate", "size")] == [2, 3]
    lightning_setattr(module, "rate", 9)
    lightning_setattr(module, "size", 8)
    assert (module.rate, module.hparams.rate, data.rate, data.hparams) == (9, 9, 9, {"size": 8})


def test_an_attribute_that_is_nowhere_is_named() -> None:
    module, _ = module_with_data()
    with pytest.raises(AttributeError, match="LightningModule has no 'depth', nor have its hparams or the data module"):
        lightning_getattr(module, "depth")
    with pytest.raises(AttributeError, match=r"set self\.depth in __init__"):
        lightning_setattr(module, "depth", 1)
