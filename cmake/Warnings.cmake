# pagedattn_warnings(<target>): the warnings that all our C++ compiles without.
set(PAGEDATTN_WARNINGS -Wall -Wextra -Wconversion)
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND CMAKE_CXX_COMPILER_VERSION MATCHES "^12\\.")
  # GCC 12 sees overlapping copies in its own std::string operator+ (GCC bug 105651, mended in 13).
  list(APPEND PAGEDATTN_WARNINGS -Wno-restrict)
endif()

function(pagedattn_warnings target)
  target_compile_options(
    ${target} PRIVATE "$<$<COMPILE_LANGUAGE:CXX>:${PAGEDATTN_WARNINGS};$<$<BOOL:${PAGEDATTN_WERROR}>:-Werror>>"
                      $<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-Wall,-Wextra,-Wconversion
                      $<$<BOOL:${PAGEDATTN_WERROR}>:--Werror=all-warnings>>)
endfunction()
