# pagedattn_warnings(<target>): the warnings that all our C++ compiles without.
function(pagedattn_warnings target)
  target_compile_options(
    ${target} PRIVATE $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra -Wconversion $<$<BOOL:${PAGEDATTN_WERROR}>:-Werror>>
                      $<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-Wall,-Wextra
                      $<$<BOOL:${PAGEDATTN_WERROR}>:--Werror=all-warnings>>)
endfunction()
