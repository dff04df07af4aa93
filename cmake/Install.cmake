# Installs the library as a CMake package (find_package(pagedattn)) and for pkg-config.  A wheel carries the same tree
# inside the Python package.
include(CMakePackageConfigHelpers)

if(SKBUILD)
  set(CMAKE_INSTALL_LIBDIR lib) # one place in every wheel, whatever the distribution calls it
endif()
set(PAGEDATTN_CMAKE_DIR ${CMAKE_INSTALL_LIBDIR}/cmake/pagedattn)
