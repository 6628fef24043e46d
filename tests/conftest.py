"""What all tests share: 8 simulated devices, and the real data where it lies beside the repo."""

import collections
import os
import pathlib
import sys
from collections.abc import Iterator

# Before anything imports JAX or TensorFlow.
# Compiling without LLVM's costly passes takes half the time and changes no result beyond rounding.
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 --xla_llvm_disable_expensive_passes=true"
    " --xla_backend_optimization_level=0"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Arrays of two dtypes never meet by accident; also in the processes that tests start.
os.environ["JAX_NUMPY_DTYPE_PROMOTION"] = "strict"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")  # as hashvision/__main__.py

import jaxtyping
import pytest

# Checks the shapes and dtypes of arrays, and all other annotations, of these packages.
jaxtyping.install_import_hook(
    [f"hashvision.{name}" for name in ("models", "objectives", "pixels", "evaluation")],
    "beartype.beartype",
)

REPO = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture
def shared_data() -> pathlib.Path:
    """The folder of real photos; the test is skipped where it is absent."""
    path = REPO.parent / "shared" / "data"
    if not path.exists():
        pytest.skip("the real data (../shared/data) is not here")
    return path


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Programs that tests' processes compile are cached for this session alone, by all workers."""
    session = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        session = session.parent
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(session / "cache"))
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        yield


@pytest.fixture(autouse=True)
def compiled_programs_are_shared(request: pytest.FixtureRequest) -> None:
    """Lets all tests of this checkout, also of later sessions, share what they compile.

    Set again before each test, since `train` sets another folder, which may be gone. Processes that
    tests start have the cache of the session, since a killed one may leave half a program in it.
    """
    if "jax" in sys.modules:
        import jax
        from jax.experimental.compilation_cache import compilation_cache

        folder = str(request.config.rootpath / ".pytest_cache" / "compiled")
        if jax.config.jax_compilation_cache_dir != folder:
            jax.config.update("jax_compilation_cache_dir", folder)
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
            compilation_cache.reset_cache()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files of many slow tests first, so that no worker is left with one when the others end."""
    slow = collections.Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])
