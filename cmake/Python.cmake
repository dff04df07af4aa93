# The Python extension modules: _core (pybind11, over the C ABI) and _block_manager (Cython).
find_package(Python COMPONENTS Interpreter Development.Module)
if(NOT Python_Development.Module_FOUND)
  message(FATAL_ERROR "Python's C headers were not found for ${Python_EXECUTABLE}. Debian and Ubuntu have them in the "
                      "package python3-dev, Fedora in python3-devel.")
endif()
set(PYBIND11_FINDPYTHON ON)
find_package(pybind11 CONFIG REQUIRED)
include(UseCython)

file(GLOB PAGEDATTN_BINDING_SOURCES CONFIGURE_DEPENDS src/bindings/*.cpp)
pybind11_add_module(_core MODULE ${PAGEDATTN_BINDING_SOURCES})
target_link_libraries(_core PRIVATE pagedattn::pagedattn)
target_include_directories(_core PRIVATE src)
pagedattn_warnings(_core)

cython_transpile(python/pagedattn/_block_manager.pyx LANGUAGE CXX OUTPUT_VARIABLE PAGEDATTN_BLOCK_MANAGER_CXX)
python_add_library(_block_manager MODULE ${PAGEDATTN_BLOCK_MANAGER_CXX} WITH_SOABI)
target_include_directories(_block_manager PRIVATE src)
target_link_libraries(_block_manager PRIVATE Threads::Threads)

# Hidden visibility does not reach the standard library's templates; the version script does.
set(PAGEDATTN_MODULE_EXPORTS ${CMAKE_CURRENT_SOURCE_DIR}/cmake/exports_module.map)
foreach(module _core _block_manager)
  target_link_options(${module} PRIVATE LINKER:--version-script=${PAGEDATTN_MODULE_EXPORTS})
  set_target_properties(
    ${module}
    PROPERTIES LINK_DEPENDS ${PAGEDATTN_MODULE_EXPORTS}
               # A new library behind the same C API needs no new module: linking _core takes longer than the library.
               LINK_DEPENDS_NO_SHARED ON
               # The library lies in pagedattn/lib, beside the extension modules.
               INSTALL_RPATH "$ORIGIN/${CMAKE_INSTALL_LIBDIR}")
  install(TARGETS ${module} LIBRARY DESTINATION .)
endforeach()
