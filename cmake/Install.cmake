# Installs the library as a CMake package (find_package(pagedattn)) and for pkg-config.  A wheel carries the same tree
# inside the Python package: pagedattn/lib and pagedattn/include.
include(CMakePackageConfigHelpers)

# A wheel holds no symbolic links: there the library has its plain name alone.
if(NOT SKBUILD)
  # 0 until 1.0: the C ABI's structs carry their size and grow at their end, so releases stay compatible.
  set_target_properties(pagedattn PROPERTIES VERSION ${PROJECT_VERSION} SOVERSION 0)
endif()

install(
  TARGETS pagedattn
  EXPORT pagedattnTargets
  LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR})
install(
  DIRECTORY include/pagedattn
  DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}
  FILES_MATCHING
  PATTERN "*.h"
  PATTERN "*.hpp")

# --- find_package ------------------------------------------------------------------------------------------------
set(PAGEDATTN_CMAKE_DIR ${CMAKE_INSTALL_LIBDIR}/cmake/pagedattn)
install(
  EXPORT pagedattnTargets
  NAMESPACE pagedattn::
  DESTINATION ${PAGEDATTN_CMAKE_DIR})
configure_package_config_file(cmake/pagedattnConfig.cmake.in pagedattnConfig.cmake
                              INSTALL_DESTINATION ${PAGEDATTN_CMAKE_DIR} NO_CHECK_REQUIRED_COMPONENTS_MACRO)
write_basic_package_version_file(pagedattnConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/pagedattnConfig.cmake
              ${CMAKE_CURRENT_BINARY_DIR}/pagedattnConfigVersion.cmake DESTINATION ${PAGEDATTN_CMAKE_DIR})

# --- pkg-config --------------------------------------------------------------------------------------------------
# Every path hangs on the .pc file's own place, so that the tree may be moved.
set(PAGEDATTN_PKGCONFIG_DIR ${CMAKE_INSTALL_LIBDIR}/pkgconfig)
foreach(dir LIBDIR INCLUDEDIR)
  file(RELATIVE_PATH PAGEDATTN_PC_${dir} ${CMAKE_INSTALL_FULL_LIBDIR}/pkgconfig ${CMAKE_INSTALL_FULL_${dir}})
endforeach()
configure_file(cmake/pagedattn.pc.in pagedattn.pc @ONLY)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/pagedattn.pc DESTINATION ${PAGEDATTN_PKGCONFIG_DIR})
