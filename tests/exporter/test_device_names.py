"""One vocabulary for target devices: every spelling in every command and function that asks for a device or its SM."""

import argparse

import pytest

import exporter
from exporter import cli
from exporter.timing.device import timed_board
from moee.errors import UserError
from plugins.aot import build
from plugins.devices import DEVICES, HOW, NAMES, PROFILES, SMS, known_sms, profile_named, sm_named
from plugins.library import embed
from plugins.targets import TARGETS

ORIN = ("orin", "orin-agx", "87", "sm_87", "8.7", "sm87", "SM_87", "Orin AGX", "orin_nano", "jetson-orin", " 87 ")
UNKNOWN = {
    "abacus": "unknown device 'abacus'", "orin-": "unknown device 'orin-'", "": "unknown device ''", "99": "unknown SM 99",
    "sm_88": "unknown SM sm_88", "8.8": "unknown SM 8.8", "0": "unknown SM 0", "-87": "unknown SM -87", "8-7": "unknown SM 8-7",
    "9" * 5000: "unknown SM 999", "sm_90": "", "٨٧": "unknown device",
}  # fmt: skip


def test_the_table_covers_every_target_and_no_name_stands_for_two():
    assert {device.sm for device in DEVICES} == set(TARGETS)
    spelt = [name for device in DEVICES for name in (device.name, *device.also)]
    assert len(set(spelt)) == len(spelt) and all(name == name.lower() and " " not in name for name in spelt)
    for device in DEVICES:
        assert {sm_named(name) for name in (device.name, *device.also)} == {device.sm}
    for sm, target in TARGETS.items():
        assert {sm_named(text) for text in (str(sm), f"sm_{sm}", f"{sm / 10:.1f}", target.arch)} == {sm}
    assert all(profile.source and profile.tflops > 0 and profile.gbytes > 0 for profile in PROFILES.values())


@pytest.fixture
def asked(monkeypatch):
    """The SMs that the work was asked for. Nothing is read, compiled or loaded: it stops there."""
    sms = []

    def stop(value):
        sms.append(tuple(value))
        raise UserError("asked")

    for where in ("exporter.engines.plugin_cache", "exporter.api"):
        monkeypatch.setattr(f"{where}.ensure_plugin", lambda wanted, report: stop(wanted))
        monkeypatch.setattr(f"{where}.ensure_kernels", lambda wanted, report: stop(wanted))
    for where in ("exporter.engines.build", "exporter.api"):
        monkeypatch.setattr(f"{where}.require_backend", lambda name: None)
        monkeypatch.setattr(f"{where}.needs_plugin", lambda path: True)
    for where in ("exporter.ship.deployment", "exporter.api"):
        monkeypatch.setattr(f"{where}.write_deployment", lambda path, out, sm, *rest, **others: stop([sm]))
    monkeypatch.setattr("exporter.timing.profile.batch_profile", lambda *shapes: (1, 8, 32))
    monkeypatch.setattr("exporter.manifests.read_export", lambda path, verify: {})
    monkeypatch.setattr("exporter.manifests.refuse_module", lambda *export: None)
    monkeypatch.setattr(build, "build_kernels", lambda out, wanted, *rest, **others: stop(wanted))
    monkeypatch.setattr(embed, "embed", lambda kernels, out, wanted: stop(wanted))
    return sms


def said(function, *arguments, **options):
    """Exit code 2, as the command line gives it for what a function raises."""
    with pytest.raises(UserError):
        function(*arguments, **options)
    return 2


COMMANDS = {  # that compile for a device, by the value of --sm
    "build": lambda sm: cli.main(["build", "export", f"--sm={sm}", "--out", "out"]),
    "bundle": lambda sm: cli.main(["bundle", "export", f"--sm={sm}", "--out", "out"]),
    "plugin build": lambda sm: cli.main(["plugin", "build", f"--sm={sm}"]),
    "plugin bundle": lambda sm: cli.main(["plugin", "bundle", f"--sm={sm}", "--out", "out"]),
    "plugins.aot": lambda sm: build.main([f"--sm={sm}"]),
    "plugins.library.embed": lambda sm: embed.main(["--kernels", "kernels", "--out", "out", f"--sm={sm}"]),
    "exporter.build": lambda sm: said(exporter.build, "export", "out", sms=[sm]),
    "exporter.bundle": lambda sm: said(exporter.bundle, "export", "out", sm=sm),
}
SEVERAL = ("build", "plugin build", "plugins.library.embed")


@pytest.mark.parametrize("spelling", ORIN)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_name_and_a_number_are_one_sm(command, spelling, asked, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert COMMANDS[command](spelling) == 2 and asked == [(87,)]


@pytest.mark.parametrize("command", SEVERAL)
def test_lists_may_mix_them(command, asked, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert COMMANDS[command]("rtx-4090,orin, 8.6,87") == 2 and asked == [(86, 87, 89)]


@pytest.mark.parametrize("command", COMMANDS)
def test_an_unknown_one_is_one_sentence_with_what_is_known(command, asked, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, message in (("abacus", "unknown device 'abacus'"), ("99", "unknown SM 99")):
        assert COMMANDS[command](name) == 2 and not asked
        error = capsys.readouterr().err
        assert command.startswith("exporter.") or (message in error and NAMES in error and SMS in error and len(error) < 600)
        assert "Traceback" not in error and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_is_unknown(name):
    if not UNKNOWN[name]:
        assert sm_named(name) in TARGETS
        return
    with pytest.raises(UserError, match=UNKNOWN[name]) as error:
        sm_named(name)
    assert len(str(error.value)) < 400
    with pytest.raises(UserError):
        profile_named(name)


def test_python_takes_numbers_and_a_text_of_several(asked):
    assert known_sms([89, "orin", 87]) == (87, 89)
    for sms in ([87, "rtx-4090"], "orin,8.9"):
        said(exporter.build, "export", "out", sms=sms)
    assert asked == [(87, 89), (87, 89)]
    with pytest.raises(UserError, match="unknown SM 0"):
        exporter.bundle("export", "out", sm=0)


PLAN = ["plan", "tiny", "--data", "digits", "--min-cosine", "0.9", "--out", "plan", "--device"]


@pytest.mark.parametrize("spelling", ["orin-agx", "Orin AGX", "agx-orin", "jetson_agx_orin"])
def test_a_plan_takes_a_board_by_any_of_its_names(spelling, monkeypatch, tmp_path, capsys):
    def session(*arguments):
        raise UserError("the model is loaded")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("exporter.commands.models.plan.session_of", session)
    assert cli.main([*PLAN, spelling]) == 2 and "the model is loaded" in capsys.readouterr().err
    assert timed_board(spelling) is PROFILES["orin-agx"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        *[(name, "a board of sm_87 that has them: orin-agx, orin-nano") for name in ("orin", "87", "sm_87", "8.7", "orin-nx")],
        ("rtx-40", "name a board of sm_89 that has them: l4, rtx-4090"), ("h100", "a board of sm_90 that has them: h200"),
        ("b200", "RESULT.json, rtx-3090, orin-agx"),
        ("abacus", "unknown device 'abacus'; expected one of cpu, cuda, tensorrt, ssh:HOST"),
        ("99", "unknown device '99'; expected one of cpu"),
    ],
)  # fmt: skip
def test_a_plan_guesses_no_board_and_refuses_before_a_model_is_loaded(name, message, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("exporter.commands.models.plan.session_of", None)
    assert cli.main([*PLAN, name]) == 2
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())
    assert timed_board("cpu") is None


def test_every_option_for_a_device_says_how_it_is_written():
    parsers, shown = [cli.build_parser()], {}
    for parser in parsers:
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                parsers.extend(action.choices.values())
            elif set(action.option_strings) & {"--sm", "--device"}:
                shown[parser.prog, action.option_strings[0]] = action.help
    assert {prog for prog, option in shown if option == "--sm"} == {
        "moee build", "moee bundle", "moee compress", "moee plan", "moee plugin build", "moee plugin bundle"
    }  # fmt: skip
    assert all(HOW in text for (_, option), text in shown.items() if option == "--sm")
    assert all(name in shown["moee plan", "--device"] for name in PROFILES)
