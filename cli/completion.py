"""adaptlib completion: the script that lets a shell complete command lines."""

import sys
from typing import Annotated

import typer

from . import out
from .options import JsonOption, LibraryOption, QuietOption

EXAMPLES = (
    "adaptlib completion bash > ~/.local/share/bash-completion/completions/adaptlib",
    "adaptlib completion zsh > ~/.zfunc/_adaptlib",
    "adaptlib completion fish > ~/.config/fish/completions/adaptlib.fish",
)
BASH = r"""# bash completion for adaptlib
_adaptlib() {
    local line first=1
    COMPREPLY=()
    while IFS= read -r line; do
        if [[ $first ]]; then
            first=
            case $line in
                files) compopt -o default 2> /dev/null ;;
                directories) compopt -o dirnames 2> /dev/null ;;
            esac
        else
            COMPREPLY+=("$line")
        fi
    done < <("$1" __complete bash "${COMP_LINE:0:COMP_POINT}" "$COMP_WORDBREAKS" 2> /dev/null)
    if [[ ${#COMPREPLY[@]} -eq 1 && ${COMPREPLY[0]} == *[:/=] ]]; then
        compopt -o nospace 2> /dev/null
    fi
}
complete -F _adaptlib adaptlib
"""
ZSH = r"""#compdef adaptlib
# zsh completion for adaptlib
_adaptlib() {
    local -a lines values
    local line value
    lines=("${(@f)$("${words[1]}" __complete zsh "${(@Q)words[1,CURRENT]}" 2> /dev/null)}")
    case ${lines[1]} in
        files) _files; return ;;
        directories) _files -/; return ;;
    esac
    for line in "${(@)lines[2,-1]}"; do
        value=${line%%$'\t'*}
        value=${value//:/\\:}
        [[ $line == *$'\t'* ]] && value+=:${line#*$'\t'}
        values+=("$value")
    done
    (( ${#values} )) && _describe -t values adaptlib values
}
if [[ ${funcstack[1]} == _adaptlib ]]; then
    _adaptlib "$@"
else
    compdef _adaptlib adaptlib
fi
"""
FISH = r"""# fish completion for adaptlib
function __adaptlib_complete
    set -l words (commandline -opc) (commandline -ct)
    set -l lines ($words[1] __complete fish $words 2> /dev/null)
    switch "$lines[1]"
        case files
            __fish_complete_path (commandline -ct)
        case directories
            __fish_complete_directories (commandline -ct)
        case '*'
            printf '%s\n' $lines[2..-1]
    end
end
complete -c adaptlib -f -a '(__adaptlib_complete)'
"""
SCRIPTS = {"bash": BASH, "zsh": ZSH, "fish": FISH}


def completion(
    shell: Annotated[str, typer.Argument(metavar="SHELL", help="bash, zsh or fish.")],
    library: LibraryOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Print the script that completes commands, options, and the names in your library.

    Write it to a file that the shell reads when it starts, as below, or let the shell read it each
    time. Names are of the library that the line says, else of yours.
    """
    from adaptlib.errors import UsageError

    from .suggest import near

    if shell not in SCRIPTS:
        raise UsageError(
            f"no completion for {shell!r}{near(shell, SCRIPTS)}; there is: {', '.join(SCRIPTS)}",
            hint="adaptlib completion bash",
        )
    if json:
        out.document("completion", shell=shell, script=SCRIPTS[shell])
    else:
        sys.stdout.write(SCRIPTS[shell])
