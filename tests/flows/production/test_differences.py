"""What is wanted beside what stands, without a server."""

import pytest

from flows.production.differences import compared, shown, summary
from flows.production.pools import Size, asks_for_gpu, declared, merged, pool_differences
from flows.production.variables import SECRETS, Shell, names_in
from stages.runtime.contract import StageError


def lines(now, wanted):
    return [(one.what, one.now, one.wanted) for one in compared(now, wanted)]


def test_compared_names_each_field_that_differs_and_no_other():
    now = {"a": {"b": 1, "c": [1, 2]}, "gone": "x", "same": None}
    wanted = {"a": {"b": 2, "c": [1, 2], "new": True}, "same": None}
    assert lines(now, wanted) == [("a.b", "1", "2"), ("a.new", "missing", "true"), ("gone", "x", "removed")]
    assert lines(wanted, wanted) == []
    assert lines({"set": {"b", "a"}}, {"set": {"a", "b"}}) == []


def test_shown_value_is_one_short_line_without_a_password():
    assert shown("http://user:word@host:5000/x") == "http://***@host:5000/x"
    assert shown({"uri": "s3://key:word@host", "n": 1}) == '{"n": 1, "uri": "s3://***@host"}'
    assert shown("") == '""' and len(shown("x" * 1000)) < 130
    assert summary([], dry=True) == "nothing to change: 0 as they were"


def test_shell_fills_what_it_has_and_keeps_what_stands_where_it_has_nothing():
    said = {"a": "{{ $ONE }}-x", "b": ["{{ $TWO }}"], "c": 3, "d": "{{ $ENGINERY_STACK }}-net"}
    shell = Shell({"ONE": "1", "TWO": ""})
    assert shell.fill(said) == {"a": "1-x", "b": [""], "c": 3, "d": "enginery-net"}
    assert shell.kept == shell.missing == set()
    stands = {"a": "0-x", "b": ["two"], "c": 4, "d": "other-net", "e": "more"}
    assert shell.fill(said, stands) == {"a": "1-x", "b": ["two"], "c": 3, "d": "other-net"}
    assert shell.kept == {"TWO", "ENGINERY_STACK"}
    assert shell.kept_line() == ["not set here, and kept as they stand: ENGINERY_STACK, TWO"]


def test_shell_without_what_is_needed_names_all_of_it():
    shell = Shell({"ARRIVAL_URI": "s3://b/c"})
    shell.fill({"uri": "{{ $ARRIVAL_URI }}", "recipe": "{{ $ARRIVAL_RECIPE }}"})
    shell.missing.add("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(StageError, match="ARRIVAL_RECIPE, AWS_SECRET_ACCESS_KEY"):
        shell.check()


@pytest.mark.parametrize("kind", ["docker", "kubernetes"])
@pytest.mark.parametrize("pool", ["flows", "cpu", "gpu"])
def test_filled_template_holds_no_secret_and_no_name_that_is_left(kind, pool):
    said = declared(pool, kind, 1)
    made = Shell(dict.fromkeys(names_in(said), "hidden")).fill(said)
    assert names_in(made) == set()
    env = made["variables"]["properties"]["env"]["default"]
    assert {name: env[name] for name in SECRETS if name in env} == {
        name: f"{{{{ prefect.blocks.secret.enginery-{name.lower().replace('_', '-')} }}}}"
        for name in SECRETS
        if name in env
    }
    assert merged(made, made) == made


@pytest.mark.parametrize("kind", ["docker", "kubernetes"])
def test_template_of_a_pool_without_gpus_asks_for_none(kind):
    assert asks_for_gpu(declared("gpu", kind, 2)) and not asks_for_gpu(declared("gpu", kind, 0))
    assert not asks_for_gpu(declared("cpu", kind, 2))


def test_merged_template_keeps_what_an_operator_added_and_takes_everything_that_is_declared():
    wanted = declared("cpu", "kubernetes", 0)
    stands = declared("cpu", "kubernetes", 0)
    variables = stands["variables"]["properties"]
    claim = {"name": "scratch", "persistentVolumeClaim": {"claimName": "mine"}}
    variables["scratch"]["default"], variables["node_selector"]["default"] = claim, {"disk": "fast"}
    variables["env"]["default"] = {"HTTPS_PROXY": "http://p", "PREFECT_CLIENT_MAX_RETRIES": "99"}
    variables["extra"] = {"type": "string"}
    variables["memory_bytes"]["default"] = 1
    stands["job_configuration"]["command"] = "mine"
    made = merged(wanted, stands)
    assert {one.what for one in compared(stands, made)} == {
        "job_configuration.command",
        "variables.properties.env.default.PREFECT_CLIENT_MAX_RETRIES",
        "variables.properties.memory_bytes.default",
    }
    assert compared(merged(wanted, made), made) == []


def test_secret_that_stands_in_a_template_in_the_open_is_replaced_and_not_shown():
    from prefect.client.schemas.objects import WorkPool

    wanted = Shell({}).fill(declared("cpu", "docker", 0))
    stands = Shell({}).fill(declared("cpu", "docker", 0))
    stands["variables"]["properties"]["env"]["default"]["AWS_SECRET_ACCESS_KEY"] = "open-secret"
    pool = WorkPool.model_construct(base_job_template=stands, concurrency_limit=None)
    (found,) = pool_differences(wanted, pool, kind="docker", at_first=1, asked=None)
    assert found.now == "a value" and "open-secret" not in str(found)


def test_size_is_what_the_options_say_and_then_the_shell():
    shell = {"ENGINERY_GPUS": "4", "ENGINERY_CPU_STEPS": "3"}
    told = Size.told(shell, None, None)
    assert [told.at_first(pool) for pool in ("flows", "cpu", "gpu")] == [8, 3, 4]
    assert [told.asked(pool) for pool in ("flows", "cpu", "gpu")] == [None] * 3
    told = Size.told(shell, 0, 5)
    assert [told.asked(pool) for pool in ("flows", "cpu", "gpu")] == [None, 5, 1]
    assert [Size.told({}, None, None).at_first(pool) for pool in ("cpu", "gpu")] == [1, 1]
    for wrong in ("0", "-1", "two", "1.5"):
        with pytest.raises(StageError, match="ENGINERY_CPU_STEPS is a count"):
            Size.told({"ENGINERY_CPU_STEPS": wrong}, None, None)
