"""Every form of a routed layer, one line each, by the name of its kind."""

from __future__ import annotations

from typing import Any

from exporter.forms.clear import ClearForm
from exporter.forms.form import LayerForm
from exporter.forms.gated import GatedForm
from exporter.forms.low_rank import LowRankForm
from exporter.forms.routed import RoutedForm
from moee.kinds.registry import kind_of
from moee.layers.routed import RoutedLayer

FORMS: dict[str, LayerForm[Any]] = {form.name: form for form in (RoutedForm(), ClearForm(), GatedForm(), LowRankForm())}


def form_of(layer: RoutedLayer) -> LayerForm[Any]:
    """The form of a layer's kind."""
    kind = kind_of(layer).name
    assert kind in FORMS, f"layers of the kind {kind} have no form; list it in {__name__}"
    return FORMS[kind]
