# Sourced by the scripts beside it. Puts the packages of requirements.lock and an editable jaxlm into .venv, once:
# a stamp in .venv remembers what was installed, so a second run touches neither the environment nor the network.
# Leaves the caller in the checkout's root with VENV set. Keeps to the bash 3.2 that macOS ships.
#
#   PYTHON=/path/to/python   the interpreter to build .venv from (default: the newest of 3.13, 3.12 and 3.11 that runs,
#                            on PATH or among those of uv and pyenv)
#
# A .venv that fits the checkout is kept, though a newer Python may have come since: set PYTHON to change it.

fail() { # fail STATUS MESSAGE...: one line, then out
  local status=$1
  shift
  echo "error: $*" >&2
  exit "$status"
}

candidates() { # prints the interpreters to try, one a line, the preferred first
  local version folder pyenv="${PYENV_ROOT:-${HOME:-}/.pyenv}/versions"
  if [ -n "${PYTHON:-}" ]; then
    echo "$PYTHON"
    return
  fi
  for version in 3.13 3.12 3.11; do
    echo "python$version"
    if command -v uv >/dev/null 2>&1; then uv python find --system --no-python-downloads "$version" 2>/dev/null || true; fi
    for folder in "$pyenv/$version".*[0-9]; do
      if [ -x "$folder/bin/python" ]; then echo "${folder##*/}"; fi
    done | sort -t. -k3,3nr | while read -r folder; do echo "$pyenv/$folder/bin/python"; done
  done
  echo python3
  echo python
}

find_python() { # sets PY and PY_VERSION
  local candidate rejected="" all
  all=$(candidates)
  while read -r candidate; do
    # A name on PATH may still not run (a version manager's shim, an uninstalled version): that is no candidate.
    PY_VERSION=$("$candidate" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null </dev/null) ||
      PY_VERSION=""
    case $PY_VERSION in
      3.11.* | 3.12.* | 3.13.*)
        PY=$(command -v "$candidate")
        return
        ;;
    esac
    if [ -n "$PY_VERSION" ]; then
      rejected=${rejected:-"$candidate is $PY_VERSION"}
    elif [ -n "${PYTHON:-}" ]; then
      rejected="$PYTHON does not run"
    fi
  done <<<"$all"
  fail 2 "jaxlm needs Python 3.11, 3.12 or 3.13${rejected:+ ($rejected)}: install one or set PYTHON=/path/to/python"
}

make_venv() { # make_venv [--clear]
  if command -v uv >/dev/null 2>&1; then
    uv venv --no-python-downloads --python "$PY" "${1:---allow-existing}" "$VENV"
  else
    "$PY" -m venv "$@" "$VENV"
  fi
}

install() { # install ARGUMENTS: as `pip install` takes them
  if command -v uv >/dev/null 2>&1; then
    uv pip install --python "$VENV/bin/python" "$@"
  else
    # A .venv that uv made has no pip of its own.
    "$VENV/bin/python" -m pip --version >/dev/null 2>&1 || "$VENV/bin/python" -m ensurepip
    "$VENV/bin/python" -m pip install --disable-pip-version-check --no-input --progress-bar off "$@"
  fi
}

explain() { # explain LOG: the one line that says what went wrong
  local errors cause
  errors=$(grep -iE '^ *([a-z]*error|cause|caused by|×|├─▶|╰─▶)' "$1") || errors="no reason given"
  # Of a dead index pip only warns, or says nothing; its error is then that it found no distribution.
  if grep -qiE 'no matching dist|connect|name resolution|dns|unreachable|timed out|max retries|proxy' <<<"$errors"; then
    fail 1 "no package index answers with what requirements.lock pins: check the network," \
      "or set PIP_INDEX_URL (UV_DEFAULT_INDEX for uv); log: $1"
  fi
  cause=$(grep -E '(^ERROR|[a-z]Error): ' <<<"$errors" | tail -n 1) || cause=$(tail -n 1 <<<"$errors")
  fail 1 "installing the packages failed: ${cause#"${cause%%[! ]*}"}; log: $1"
}

set_up() {
  local stamp="$VENV/.jaxlm-installed" log="$VENV.log" checksum had_checksum="" had_python="" had_root="" clear=""
  PY=""
  checksum=$(cat pyproject.toml requirements.lock | cksum)
  if [ -x "$VENV/bin/python" ] && [ -e "$stamp" ]; then
    { read -r had_checksum && read -r had_python && read -r had_root; } <"$stamp"
  fi
  if [ -n "${PYTHON:-}" ]; then find_python; else PY_VERSION=$had_python; fi
  if [ "$had_checksum|$had_python|$had_root" = "$checksum|$PY_VERSION|$PWD" ]; then return; fi

  [ -n "$PY" ] || find_python
  # Start anew where an earlier run served another Python or another folder: an environment cannot be moved.
  if [ -n "$had_root" ] && [ "$had_python|$had_root" != "$PY_VERSION|$PWD" ]; then clear=--clear; fi
  echo "Installing the pinned packages into $VENV with Python $PY_VERSION, once (log: $log)" >&2
  rm -f "$stamp"
  make_venv $clear >"$log" 2>&1 || fail 1 "cannot make $VENV (Debian and Ubuntu need python3-venv); log: $log"
  # The lock names every package, so nothing is left to resolve; pips before 24 fail where one is asked for with extras.
  { install --no-deps --require-hashes -r requirements.lock && install --no-deps --no-build-isolation -e .; } >>"$log" 2>&1 ||
    explain "$log"
  printf '%s\n' "$checksum" "$PY_VERSION" "$PWD" >"$stamp"
}

cd -P "$(dirname "${BASH_SOURCE[0]}")/.."
VENV=$PWD/.venv
set_up
